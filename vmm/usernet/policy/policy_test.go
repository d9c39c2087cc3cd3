package policy

import "testing"

func TestParseRule(t *testing.T) {
	for s, want := range map[string]string{
		"192.0.2.1": "192.0.2.1/32", "192.0.2.1:80": "192.0.2.1/32:80", "192.0.2.77/24": "192.0.2.0/24", "10.0.0.0/8:443": "10.0.0.0/8:443",
		"2001:db8::1": "2001:db8::1/128", "[2001:db8::1]:80": "[2001:db8::1/128]:80", "[2001:db8::1]": "2001:db8::1/128", "[2001:db8::/32]:1": "[2001:db8::/32]:1",
		"Example.ORG.": "example.org", "*.debian.org:443": "*.debian.org:443", "*": "*", "*:25": "*:25",
		"": "", ":80": "", "a:b": "", "a:0": "", "a:70000": "", "a b": "", "*.": "", "x.*": "", "..": "", "a..b": "", ".a": "", "::ffff:1.2.3.4/120": "", "exa/mple": "", "fe80::1%eth0": "", "[": "", "[]:1": "",
	} {
		r, err := Parse(s)
		if want == "" {
			if err == nil {
				t.Errorf("%q is taken for %v", s, r)
			}
			continue
		}
		if err != nil || r.String() != want {
			t.Errorf("%q: %q, %v; want %q", s, r.String(), err, want)
		}
		if again, err := Parse(r.String()); err != nil || again != r {
			t.Errorf("%q does not read as %+v again: %+v, %v", r.String(), r, again, err)
		}
	}
}

// FuzzParse: what is taken for a rule can be written and read again.
func FuzzParse(f *testing.F) {
	for _, s := range []string{"192.0.2.1:80", "[2001:db8::/32]:1", "*.debian.org", "*:25", "[", "::ffff:1.2.3.4/120", "a:", "192.0.2.1."} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := Parse(s)
		if err != nil {
			return
		}
		if again, err := Parse(r.String()); err != nil || again != r {
			t.Errorf("%q is %+v, which is written %q and read as %+v, %v", s, r, r.String(), again, err)
		}
	})
}
