package client

import (
	"slices"
	"testing"
)

func TestProxies(t *testing.T) {
	got := proxies([]string{
		"HOME=/root", "http_proxy=http://proxy.example:3128", "HTTPS_PROXY=http://localhost:8080/", "all_proxy=socks5h://me:pa@ss@127.0.0.1:1080",
		"ftp_proxy=", "no_proxy=localhost,.example", "MY_HTTP_PROXY=http://localhost:1", "ALL_PROXY=[::1]:9", "FTP_PROXY=localhost",
	})
	want := []string{
		"http_proxy=http://proxy.example:3128", "HTTPS_PROXY=http://host.wsl2.internal:8080/", "all_proxy=socks5h://me:pa@ss@host.wsl2.internal:1080",
		"no_proxy=localhost,.example", "ALL_PROXY=host.wsl2.internal:9", "FTP_PROXY=host.wsl2.internal",
	}
	if !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

func FuzzFromGuest(f *testing.F) {
	for _, s := range []string{"", "://", "http://@:/", "[::1]", "a@b@localhost:1/x@y"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if once := fromGuest(s); fromGuest(once) != once {
			t.Errorf("%q becomes %q and then %q", s, once, fromGuest(once))
		}
	})
}
