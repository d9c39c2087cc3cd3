# The machine's whole firmware: from the reset vector (real mode, CS base
# 0xffff0000) straight to 64-bit mode and to the kernel, which lies in memory
# already. This is the last page of a 64 KiB ROM; rom.go fills in params.
# Paging and protection are switched on at once, which takes page tables that
# map this page to itself: those of vmm/boot do.

	.set	base, 0xf000		# this page in CS

	.text
	.code16
start:
	cli
	cld
	lgdtl	%cs:base + gdtr - start
	movl	$0x20, %eax		# CR4: PAE
	movl	%eax, %cr4
	movl	%cs:base + cr3 - start, %eax
	movl	%eax, %cr3
	movl	$0xc0000080, %ecx	# EFER: LME
	movl	$0x100, %eax
	xorl	%edx, %edx
	wrmsr
	movl	$0x80000011, %eax	# CR0: PG, ET, PE
	movl	%eax, %cr0
	ljmpl	*%cs:base + target - start

	.code64
long:
	movzwl	data(%rip), %eax
	movl	%eax, %ds
	movl	%eax, %es
	movl	%eax, %ss
	movl	%eax, %fs
	movl	%eax, %gs
	movq	rsp(%rip), %rsp
	movq	rsi(%rip), %rsi
	xorl	%ebx, %ebx
	xorl	%ebp, %ebp
	xorl	%edi, %edi
	jmp	*rip(%rip)

	.org	0xf00
params:
gdtr:	.word	0
	.long	0
cr3:	.long	0
target:	.long	0xfffff000 + long - start
code:	.word	0
data:	.word	0
rsp:	.quad	0
rsi:	.quad	0
rip:	.quad	0

	.org	0xff0
	.code16
	jmp	start			# where the processor begins
	.org	0x1000
