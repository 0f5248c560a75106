; The guest of the QEMU side: what the bundled program `stress` does, as a PC boot sector, assembled with
;
;     nasm -f bin -D END=0x40000000 -D PAGES=16384 -D BURST=122 -D MARK=1024 guest.asm -o guest.bin
;
; It fills memory from 1 MiB up to END with a xorshift32 sequence of little-endian words and prints 'F'. Then,
; 200 times a second, it adds 1 to the first byte of the next BURST of the PAGES pages from 1 MiB on, round and round, and
; sleeps (hlt) in between, as `stress` does: neither guest takes processor time from its engine that the other leaves.
; It prints a 'B' for every MARK pages, so that the rate can be measured from outside. It never writes elsewhere.
;
; With -D STRIDE=n it touches its pages in a scattered order instead, and notes what waited for a page: the page after
; page p is p + STRIDE (less PAGES). From NOTES on there are then
;
;     u32 number of timer interrupts, at most TICKS    u32 0
;     u64 time stamp counter at the first of them      u64 at the last of them
;     u32 address of the end of the notes              u32 0
;     for each touch that took SLOW cycles or more, up to NOTES_END: u64 time stamp counter before it, u64 cycles
;
; so that both can be read from outside, and cycles be turned into seconds.
;
; Before each burst it flips CR0.WP, which means nothing here but empties the emulated TLB. QEMU 7.2's TCG needs that: when
; it fetches the dirty log it leaves the TLB alone, so a later write to a page that is in there would go unlogged.

BASE    equ 0x100000
SEED    equ 0x12345678
PAGE    equ 4096
SERIAL  equ 0x3f8
WP      equ 1 << 16
IDT     equ 0x1000
DIVISOR equ 1193182 / 200               ; of the timer: 200 Hz
NOTES   equ 0x10000
NOTES_END equ 0x90000
TICKS   equ 200
SLOW    equ 1 << 15                     ; 10 to 15 us: longer than a touch that waits for nothing

        org     0x7c00
        bits    16

        cli
        xor     cx, cx
        mov     ds, cx
        mov     ss, cx
        in      al, 0x92                ; the fast A20 gate: all of memory, odd megabytes too
        or      al, 2
        out     0x92, al
        lgdt    [gdt_pointer]
        lidt    [idt_pointer]
        mov     ecx, cr0
        inc     cx                      ; the protection bit; the BIOS leaves it clear
        mov     cr0, ecx
        jmp     CODE:flat

        bits    32
flat:   mov     cx, DATA
        mov     ds, cx
        mov     es, cx
        mov     ss, cx
        mov     esp, 0x7000

        ; the timer is the only interrupt; the BIOS has put it at vector 8
        mov     dword [IDT + 8 * 8], (CODE << 16) | (tick - $$ + 0x7c00)
        mov     dword [IDT + 8 * 8 + 4], 0x8e00
        mov     al, 0xfe
        out     0x21, al
        mov     al, 0x34
        out     0x43, al
        mov     al, DIVISOR & 0xff
        out     0x40, al
        mov     al, DIVISOR >> 8
        out     0x40, al

        cld
        mov     edi, BASE
        mov     ecx, (END - BASE) / 4
        mov     eax, SEED
next:   mov     edx, eax                ; x ^= x << 13; x ^= x >> 17; x ^= x << 5
        shl     edx, 13
        xor     eax, edx
        mov     edx, eax
        shr     edx, 17
        xor     eax, edx
        mov     edx, eax
        shl     edx, 5
        xor     eax, edx
        stosd
        loop    next

        mov     dx, SERIAL
        mov     al, 'F'
        out     dx, al

%ifdef STRIDE
        xor     edi, edi                ; the page
        mov     esi, NOTES + 32         ; where the next note goes
        mov     [NOTES], edi
        mov     [NOTES + 24], esi
burst:  sti
        hlt
        cli
        mov     eax, cr0
        xor     eax, WP
        mov     cr0, eax
        rdtsc
        mov     ebx, NOTES
        cmp     dword [ebx], TICKS
        jae     counted
        inc     dword [ebx]
        mov     [ebx + 16], eax
        mov     [ebx + 20], edx
        cmp     dword [ebx], 1
        jne     counted
        mov     [ebx + 8], eax
        mov     [ebx + 12], edx
counted:
        mov     ecx, BURST
touch:  rdtsc
        mov     ebp, eax
        mov     ebx, edx
        mov     eax, edi
        shl     eax, 12
        inc     byte [eax + BASE]
        rdtsc
        sub     eax, ebp
        cmp     eax, SLOW
        jb      quick
        cmp     esi, NOTES_END
        jae     quick
        mov     [esi], ebp
        mov     [esi + 4], ebx
        mov     [esi + 8], eax
        and     dword [esi + 12], 0
        add     esi, 16
        mov     [NOTES + 24], esi
quick:  add     edi, STRIDE
        cmp     edi, PAGES
        jb      inside
        sub     edi, PAGES
inside: loop    touch
        jmp     burst
%else
        mov     edi, BASE
        mov     ebx, MARK
burst:  sti
        hlt
        cli
        mov     eax, cr0
        xor     eax, WP
        mov     cr0, eax
        mov     ecx, BURST
count:  inc     byte [edi]
        add     edi, PAGE
        dec     ebx
        jnz     same
        mov     ebx, MARK
        mov     al, 'B'
        out     dx, al
same:   cmp     edi, BASE + PAGES * PAGE
        jb      inside
        mov     edi, BASE
inside: loop    count
        jmp     burst
%endif

tick:   push    eax
        mov     al, 0x20                ; end of interrupt
        out     0x20, al
        pop     eax
        iret

        align   8
gdt:    dq      0
CODE    equ     $ - gdt
        dq      0x00cf9a000000ffff      ; all 4 GiB, code
DATA    equ     $ - gdt
        dq      0x00cf92000000ffff      ; all 4 GiB, data
gdt_pointer:
        dw      $ - gdt - 1
        dd      gdt
idt_pointer:
        dw      9 * 8 - 1
        dd      IDT

        times   510 - ($ - $$) db 0
        dw      0xaa55
