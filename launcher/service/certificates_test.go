package service

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestHostCertificates(t *testing.T) {
	dir := t.TempDir()
	block := func(body string) string {
		return "-----BEGIN CERTIFICATE-----\n" + body + "\n-----END CERTIFICATE-----\n"
	}
	if err := os.Mkdir(filepath.Join(dir, "corp"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"a.crt":      "subject: us\n" + block("AAAA") + "and\n" + block("BBBB"),
		"corp/b.crt": block("CCCC"),
		"b.disabled": block("GGGG"),
		"key.crt":    "-----BEGIN PRIVATE KEY-----\nSECRET\n-----END PRIVATE KEY-----\n",
		"mixed.crt":  "-----BEGIN CERTIFICATE-----\n-----BEGIN PRIVATE KEY-----\nSECRET\n-----END PRIVATE KEY-----\n-----END CERTIFICATE-----\n",
		"cut.crt":    "-----BEGIN CERTIFICATE-----\nDDDD\n",
		"large.crt":  strings.Repeat("x", maxCertificateFile) + block("EEEE"),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	linked := t.TempDir()
	for name, to := range map[string]string{"dir": dir, "itself": linked} {
		if err := os.Symlink(to, filepath.Join(linked, name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		dir  anchorDir
		want []string
	}{
		{anchorDir{dir, ".crt"}, []string{"AAAA", "BBBB", "CCCC"}},
		{anchorDir{dir, ""}, []string{"AAAA", "BBBB", "GGGG", "CCCC"}},
		{anchorDir{linked, ".crt"}, []string{"AAAA", "BBBB", "CCCC"}},
		{anchorDir{filepath.Join(linked, "dir"), ".crt"}, []string{"AAAA", "BBBB", "CCCC"}},
	} {
		var want []string
		for _, body := range c.want {
			want = append(want, block(body))
		}
		if got, dropped := hostCertificates([]anchorDir{{filepath.Join(dir, "none"), ""}, c.dir}); !slices.Equal(got, want) || dropped != 0 {
			t.Errorf("%v: %q and %d more, want %q", c.dir, got, dropped, want)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "many.crt"), []byte(strings.Repeat(block("FFFF"), 2*maxCertificates)), 0o644); err != nil {
		t.Fatal(err)
	}
	if got, dropped := hostCertificates([]anchorDir{{dir, ".crt"}}); len(got) != maxCertificates || dropped != maxCertificates+3 {
		t.Errorf("%d certificates and %d more", len(got), dropped)
	}
}

// TestCertificatesFit: what is too large is left out, alone and together.
func TestCertificatesFit(t *testing.T) {
	large := strings.Repeat("x", maxCertificate)
	if got := bounded([]string{large + "x", "small"}); !slices.Equal(got, []string{"small"}) {
		t.Errorf("%d certificates beside one that is too large", len(got))
	}
	if got := bounded(slices.Repeat([]string{large}, maxCertificates)); len(got) != maxCertificateBytes/maxCertificate {
		t.Errorf("%d large certificates", len(got))
	}
}

// TestCertificatesAreAWish: distros get them when wslconfig says so.
func TestCertificatesAreAWish(t *testing.T) {
	dir := t.TempDir()
	text := "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
	if err := os.WriteFile(filepath.Join(dir, "a.crt"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	inBubble(t, func(t *testing.T, s *setup) {
		s.m.anchors = []anchorDir{{dir, ".crt"}}
		for _, want := range [][]string{nil, {text}} {
			s.settings.Network.HostCertificates = want != nil
			s.open(t, DistroSpec{Name: "one"}, nil)
			if got := s.machine(0).started.Certificates; !slices.Equal(got, want) {
				t.Errorf("%q, want %q", got, want)
			}
			if err := s.m.Terminate(t.Context(), "one"); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// FuzzCertificates: whatever files hold, certificates are blocks of their own.
func FuzzCertificates(f *testing.F) {
	f.Add("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
	f.Fuzz(func(t *testing.T, text string) {
		for _, c := range certificates(text) {
			if strings.Count(c, "-----") != 4 || len(certificates(c)) != 1 {
				t.Errorf("%q", c)
			}
		}
	})
}
