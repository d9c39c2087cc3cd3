package tools

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/wsl2/wsl2/internal/hostpath"
)

const wslpathUsage = `usage: wslpath [-a] [-u | -w | -m] PATH
Translate a path between this distro and the host.
  -u  from the host's path to this distro's (the default)
  -w  from this distro's path to the host's; symbolic links are followed
  -m  the same as -w: the host's paths have no backslashes
  -a  the result is absolute
A path has a translation if it lies in a directory that the host shares.
`

// wslpath is WSL's tool of that name (wsl.md §1.7) with POSIX paths on both sides.
func wslpath(args []string, shares hostpath.Table, out, errOut io.Writer) int {
	var toHost, absolute, mode bool
	var paths []string
	for i := 0; i < len(args); i++ {
		switch arg := args[i]; {
		case arg == "--":
			paths = append(paths, args[i+1:]...)
			i = len(args)
		case arg == "--help":
			fmt.Fprint(out, wslpathUsage)
			return 0
		case len(arg) < 2 || arg[0] != '-':
			paths = append(paths, arg)
		default:
			for _, c := range arg[1:] {
				switch {
				case c == 'a':
					absolute = true
				case c == 'h':
					fmt.Fprint(out, wslpathUsage)
					return 0
				case strings.ContainsRune("uwm", c) && !mode:
					mode, toHost = true, c != 'u'
				default: // unknown, or a second one of the three
					fmt.Fprint(errOut, wslpathUsage)
					return say(errOut, "wslpath: %s: Invalid argument", arg)
				}
			}
		}
	}
	if len(paths) != 1 {
		fmt.Fprint(errOut, wslpathUsage)
		return 1
	}
	p := paths[0]
	result, ok := translate(p, shares, toHost, absolute)
	if !ok {
		return say(errOut, "wslpath: %s: Invalid argument", p)
	}
	fmt.Fprintln(out, result)
	return 0
}

// translate is wslpath without its surroundings. A relative path means the same
// file on both sides, seen from the same directory.
func translate(p string, shares hostpath.Table, toHost, absolute bool) (string, bool) {
	if p == "" || strings.IndexByte(p, 0) >= 0 {
		return "", false
	}
	relative := !filepath.IsAbs(p)
	if relative && !absolute && !toHost {
		return p, true
	}
	slash := strings.HasSuffix(p, "/") && p != "/"
	abs, err := filepath.Abs(p)
	if err != nil {
		return "", false
	}
	if !toHost {
		if relative { // of this distro already
			return withSlash(abs, slash), true
		}
		return shares.ToGuest(p)
	}
	host, ok := shares.ToHost(withSlash(resolve(abs), slash))
	if ok && relative && !absolute {
		return p, true
	}
	return host, ok
}

func withSlash(p string, slash bool) string {
	if slash && p != "/" {
		return p + "/"
	}
	return p
}

// resolve follows the links of what exists of p.
func resolve(p string) string {
	for dir, rest := p, ""; ; dir, rest = filepath.Dir(dir), filepath.Join(filepath.Base(dir), rest) {
		if real, err := filepath.EvalSymlinks(dir); err == nil {
			return filepath.Join(real, rest)
		} else if !os.IsNotExist(err) || dir == "/" {
			return p
		}
	}
}
