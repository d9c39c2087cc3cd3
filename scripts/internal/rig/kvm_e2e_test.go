//go:build e2e

package main

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// createVM makes a VM and a vCPU: what a KVM that is only a name refuses.
func createVM(kvm *os.File) error {
	const createVM, createVCPU = 0xae01, 0xae41 // KVM_CREATE_VM, KVM_CREATE_VCPU
	vm, err := unix.IoctlRetInt(int(kvm.Fd()), createVM)
	if err != nil {
		return fmt.Errorf("KVM_CREATE_VM: %w", err)
	}
	vcpu, err := unix.IoctlRetInt(vm, createVCPU)
	if err != nil {
		return fmt.Errorf("KVM_CREATE_VCPU: %w", err)
	}
	unix.Close(vcpu)
	return unix.Close(vm)
}
