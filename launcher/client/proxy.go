package client

import (
	"net/netip"
	"strings"
)

// hostInGuest is the host's name in distros (vmm/usernet).
const hostInGuest = "host.wsl2.internal"

// proxyNames are the variables by which programs find proxies, in small letters and in
// capitals, which not all of them read.
var proxyNames = map[string]bool{"http_proxy": true, "https_proxy": true, "ftp_proxy": true, "all_proxy": true, "no_proxy": true}

// proxies are the caller's proxies as a distro reaches them: what listens on the host's
// loopback is somewhere else there.
func proxies(environ []string) (env []string) {
	for _, kv := range environ {
		name, value, _ := strings.Cut(kv, "=")
		lower := strings.ToLower(name)
		if value == "" || !proxyNames[lower] {
			continue
		}
		if lower != "no_proxy" {
			value = fromGuest(value)
		}
		env = append(env, name+"="+value)
	}
	return env
}

// fromGuest is a proxy, [SCHEME://][USER[:PASSWORD]@]HOST[:PORT][/...], for who is in a
// distro.
func fromGuest(proxy string) string {
	start := 0
	if i := strings.Index(proxy, "://"); i >= 0 {
		start = i + len("://")
	}
	end := len(proxy)
	if i := strings.IndexByte(proxy[start:], '/'); i >= 0 {
		end = start + i
	}
	if i := strings.LastIndexByte(proxy[start:end], '@'); i >= 0 {
		start += i + 1
	}
	host := proxy[start:end]
	if i := strings.LastIndexByte(host, ':'); i >= 0 && !strings.HasSuffix(host, "]") {
		host = host[:i]
	}
	bare := strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	if ip, err := netip.ParseAddr(bare); (err != nil || !ip.IsLoopback()) && !strings.EqualFold(bare, "localhost") {
		return proxy
	}
	return proxy[:start] + hostInGuest + proxy[start+len(host):]
}
