; What stands where a PC has its firmware, for recordings: 64 KiB that contain no foreign code and compress to nothing.
;
;     nasm -f bin rom.asm -o rom.bin; qemu-system-x86_64 -bios rom.bin
;
; It prints 'A', then counts for ever in the first byte of each of the 16 pages from 64 KiB on, so that a migration has
; several passes.

        bits    16
        org     0

SERIAL  equ     0x3f8

begin:  mov     ax, 0x1000              ; 64 KiB, in paragraphs
        mov     ds, ax
        mov     dx, SERIAL
        mov     al, 'A'
        out     dx, al
        xor     di, di
again:  mov     eax, cr0                ; see tests/helpers/guest.asm
        xor     eax, 1 << 16
        mov     cr0, eax
        inc     byte [di]
        add     di, 0x1000              ; wraps
        jmp     again

        times   0xfff0 - ($ - $$) db 0
        jmp     0xf000:begin            ; the processor starts here
        times   0x10000 - ($ - $$) db 0
