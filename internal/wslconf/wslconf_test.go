package wslconf

import "testing"

func TestBool(t *testing.T) {
	for text, want := range map[string]bool{
		"":                                   true,
		"[interop]\nenabled=false\n":         false,
		"[interop]\nenabled = false # off\n": false,
		"[INTEROP]\nEnabled=FALSE":           false,
		" [ interop ] \r\n enabled = \"false\" \r\n": false,
		"[interop]\nenabled=0\n":                     false,
		"[interop]\nenabled=1\n":                     true,
		"[interop]\nenabled=no\n":                    true,
		"[interop]\n#enabled=false\n":                true,
		"[boot]\nenabled=false\n":                    true,
		"enabled=false\n":                            true,
		"[interop\nenabled=false\n":                  true,
		"[interop]\nenabled=true\nenabled=false":     true,
		"[interop]\n[boot]\nenabled=false":           true,
		"[boot]\n[interop]\nother\nenabled=false":    false,
	} {
		if got := Bool(text, "interop", "enabled", true); got != want {
			t.Errorf("%q: %v", text, got)
		}
	}
	if Bool("", "boot", "systemd", false) {
		t.Error("the default is not used")
	}
}

// FuzzBool: the file may hold anything.
func FuzzBool(f *testing.F) {
	f.Add("[interop]\nenabled=false\n")
	f.Fuzz(func(t *testing.T, text string) {
		if Bool(text, "nosuchsection", "key", true) != true && text == "" {
			t.Fatal("default")
		}
		Bool(text, "interop", "enabled", false)
	})
}
