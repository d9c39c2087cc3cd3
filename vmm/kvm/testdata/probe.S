# The guest that Probe runs: it does, in few instructions, what every 64-bit
# Linux does before it can start a program, and notes at STEP which of these it
# is about to do. The numbers are those of the table "steps" in ../probe.go.
# Entered in long mode at CPL 0 with the features to exercise in RDI.
# Turned into ../probe_code.go by go generate.

	.set CODE,   0x8000
	.set STEP,   0x6000		# what is being done
	.set VALUE,  0x6008		# what was found instead
	.set XSAVE,  0x7000		# a zeroed save area
	.set SCRATCH, 0x6010
	.set USERSTACK, 0x5ff0
	.set MAGIC,  0x45425250		# EBX of our CPUID leaf
	.set LEAF,   0x40000000

	.code64
	.org 0
start:
	movl	$1, STEP
	movl	$LEAF, %eax
	xorl	%ecx, %ecx
	cpuid
	movl	%ebx, VALUE
	cmpl	$MAGIC, %ebx
	jne	fail

	movl	$2, STEP
	fninit
	fwait

	movl	$3, STEP
	int3				# the handler only returns

	movl	$4, STEP
	testb	$1, %dil
	jz	1f
	movl	$0xff, %eax
	popcntl	%eax, %ecx
	movl	%ecx, VALUE
	cmpl	$8, %ecx
	jne	fail
1:
	movl	$5, STEP
	testb	$2, %dil
	jz	1f
	xorl	%eax, %eax
	xorl	%edx, %edx
	lock cmpxchg16b SCRATCH
	jnz	fail
1:
	movl	$6, STEP
	testb	$4, %dil
	jz	1f
	movl	$1, %eax
	xorl	%edx, %edx
	xsave	XSAVE
	xrstor	XSAVE
1:
	movl	$7, STEP
	movl	$0xc0000080, %ecx	# EFER: SCE
	rdmsr
	orl	$1, %eax
	wrmsr
	movl	$0xc0000081, %ecx	# STAR: SYSCALL 0x08, SYSRET 0x18
	xorl	%eax, %eax
	movl	$0x001b0008, %edx
	wrmsr
	movl	$0xc0000082, %ecx	# LSTAR
	movl	$(CODE+syscall_entry-start), %eax
	xorl	%edx, %edx
	wrmsr

	movl	$8, STEP
	pushq	$0x23
	pushq	$USERSTACK
	pushq	$2
	pushq	$0x2b
	pushq	$(CODE+user-start)
	iretq

user:
	movl	%cs, %eax
	movl	%eax, VALUE
	cmpl	$0x2b, %eax
	jne	fail

	movl	$9, STEP
	movl	$LEAF, %eax
	xorl	%ecx, %ecx
	cpuid
	movl	%ebx, VALUE
	cmpl	$MAGIC, %ebx
	jne	fail

	movl	$10, STEP
	syscall
	movl	%cs, %eax		# back from SYSRET
	movl	%eax, VALUE
	cmpl	$0x2b, %eax
	jne	fail
	syscall

syscall_entry:
	movl	%cs, %eax
	movl	%eax, VALUE
	cmpl	$0x08, %eax
	jne	fail
	cmpl	$10, STEP
	jne	done
	movl	$11, STEP
	sysretq
done:
	movl	$12, STEP
	outb	%al, $0xf4
fail:
	hlt

	.balign 16, 0x90
breakpoint:
	iretq
