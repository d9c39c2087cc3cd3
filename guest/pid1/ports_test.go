package pid1

import (
	"reflect"
	"testing"

	"github.com/wsl2/wsl2/internal/wire"
)

// TestFirstPorts: of more ports than a message holds, the same ones are told of every time.
func TestFirstPorts(t *testing.T) {
	all := map[wire.Port]bool{}
	for n := range wire.MaxPorts {
		all[wire.Port{Distro: "debian", Number: uint16(n + 1), V4: true}] = true
		all[wire.Port{Distro: "debian", Number: uint16(n + 1), V4: true, UDP: true}] = true
	}
	list := firstPorts(all)
	if len(list) != wire.MaxPorts || list[0].UDP || !list[1].UDP || list[1].Number != 1 {
		t.Fatalf("%d ports, from %v", len(list), list[:2])
	}
	for range 20 {
		if again := firstPorts(all); !reflect.DeepEqual(again, list) {
			t.Fatal("they are other ones now")
		}
	}
}
