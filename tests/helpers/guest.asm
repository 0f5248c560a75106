; A guest whose memory proves that a migration lost nothing: a PC boot sector, assembled with
;
;     nasm -f bin -D END=0x1000000 -D PAGES=256 -D DELAY=2000 guest.asm -o guest.bin
;
; (-D SUSPEND: it suspends to RAM behind the 'F', on a machine of type "pc".)
;
; It prints 'A' when it starts, fills memory from 1 MiB up to END with a xorshift32 sequence of little-endian words, and
; prints 'F'. Then it keeps adding 1 to the first byte of each of the PAGES pages from 1 MiB on, in order, and prints 'B'
; after each pass. DELAY iterations of an empty loop between two pages determine the dirty rate.
;
; Invariant: at any instant those bytes, minus their value in the sequence, are the same number c (mod 256) up to some page
; and c - 1 from there on; every other byte is that of the sequence. tests/helpers/qemu.py checks it.
;
; Before each count it flips CR0.WP, which has no effect here except to flush the emulated TLB. QEMU 7.2's TCG needs that:
; it does not flush the TLB when it harvests the dirty log, so later writes to pages in the TLB are not logged, and a
; migration of more than two passes between two QEMUs loses them.

BASE    equ 0x100000
SEED    equ 0x12345678
PAGE    equ 4096
SERIAL  equ 0x3f8
WP      equ 1 << 16
PM1_CONTROL equ 0x604                   ; the ACPI register of PIIX4, where QEMU's firmware puts it
SLEEP   equ 1 << 13 | 1 << 10           ; S3, now

        org     0x7c00
        bits    16

        cli
        xor     cx, cx
        mov     ds, cx
        in      al, 0x92                ; the fast A20 gate: all of memory, odd megabytes too
        or      al, 2
        out     0x92, al
        lgdt    [gdt_pointer]
        mov     ecx, cr0
        inc     cx                      ; the protection bit; the BIOS leaves it clear
        mov     cr0, ecx
        jmp     CODE:flat

        bits    32
flat:   mov     cx, DATA
        mov     ds, cx
        mov     es, cx
        mov     ss, cx

        mov     dx, SERIAL
        mov     al, 'A'
        out     dx, al

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

%ifdef SUSPEND
        mov     dx, PM1_CONTROL
        mov     ax, SLEEP
        out     dx, ax
%endif

again:  mov     edi, BASE
        mov     esi, PAGES
count:  mov     eax, cr0
        xor     eax, WP
        mov     cr0, eax
        inc     byte [edi]
        mov     ecx, DELAY
rest:   loop    rest
        add     edi, PAGE
        dec     esi
        jnz     count
        mov     al, 'B'
        out     dx, al
        jmp     again

        align   8
gdt:    dq      0
CODE    equ     $ - gdt
        dq      0x00cf9a000000ffff      ; all 4 GiB, code
DATA    equ     $ - gdt
        dq      0x00cf92000000ffff      ; all 4 GiB, data
gdt_pointer:
        dw      $ - gdt - 1
        dd      gdt

        times   510 - ($ - $$) db 0
        dw      0xaa55
