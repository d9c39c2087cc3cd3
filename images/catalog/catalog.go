// Package catalog knows distros by name: those of WSL's DistributionInfo.json
// (microsoft/WSL, distributions/), wherever a copy of that lies, and a few images of
// our own choice.
package catalog

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"
)

// DefaultURL is where Microsoft keeps its list.
const DefaultURL = "https://raw.githubusercontent.com/microsoft/WSL/master/distributions/DistributionInfo.json"

const (
	// maxList bounds the list; Microsoft's has some 20 KiB.
	maxList = 4 << 20
	timeout = 30 * time.Second
)

// Distro is an entry of the catalogue.
type Distro struct {
	Name         string `json:"name"`
	FriendlyName string `json:"friendlyName"`
	// Flavor groups versions of one distro; the Default of a flavor is meant by its name.
	Flavor  string `json:"flavor"`
	Default bool   `json:"default"`
	// Either a file with its SHA-256, or an image of a registry.
	URL    string `json:"url,omitempty"`
	SHA256 string `json:"sha256,omitempty"`
	Image  string `json:"image,omitempty"`
}

// List is a catalogue.
type List struct {
	Distros []Distro
	// Default is the flavor or name that is meant by none.
	Default string
}

// BuiltIn are images that make good distros, by the names that people type.
func BuiltIn() List {
	l := List{Default: "debian"}
	for _, d := range []struct{ name, friendly, image string }{
		{"debian", "Debian stable", "docker.io/library/debian:stable"},
		{"ubuntu", "Ubuntu LTS", "docker.io/library/ubuntu:latest"},
		{"alpine", "Alpine Linux", "docker.io/library/alpine:latest"},
		{"fedora", "Fedora", "docker.io/library/fedora:latest"},
		{"archlinux", "Arch Linux", "docker.io/library/archlinux:latest"},
		{"opensuse", "openSUSE Leap", "docker.io/opensuse/leap:latest"},
	} {
		l.Distros = append(l.Distros, Distro{Name: d.name, FriendlyName: d.friendly, Flavor: d.name, Default: true, Image: d.image})
	}
	return l
}

// manifest is DistributionInfo.json. Its legacy part names packages of the Windows
// store, which are none here.
type manifest struct {
	ModernDistributions map[string][]struct {
		Name, FriendlyName string
		Default            bool
		Amd64Url           *struct{ Url, Sha256 string }
	}
	Default string
}

// Parse reads a DistributionInfo.json. Entries without a file for this kind of
// machine are left out.
func Parse(text []byte) (List, error) {
	var m manifest
	if err := json.Unmarshal(text, &m); err != nil {
		return List{}, fmt.Errorf("the list of distros is no DistributionInfo.json: %w", err)
	}
	l := List{Default: m.Default}
	flavors := make([]string, 0, len(m.ModernDistributions))
	for f := range m.ModernDistributions {
		flavors = append(flavors, f)
	}
	slices.Sort(flavors)
	for _, flavor := range flavors {
		for _, d := range m.ModernDistributions[flavor] {
			if d.Name == "" || d.Amd64Url == nil || d.Amd64Url.Url == "" {
				continue
			}
			sum := strings.ToLower(strings.TrimPrefix(strings.TrimPrefix(d.Amd64Url.Sha256, "0x"), "0X"))
			l.Distros = append(l.Distros, Distro{Name: d.Name, FriendlyName: d.FriendlyName, Flavor: flavor, Default: d.Default, URL: d.Amd64Url.Url, SHA256: sum})
		}
	}
	if len(l.Distros) == 0 {
		return List{}, fmt.Errorf("the list of distros has none for this machine")
	}
	return l, nil
}

// Load reads the list at an http, https or file URL.
func Load(ctx context.Context, address string) (List, error) {
	text, err := read(ctx, address)
	if err != nil {
		return List{}, fmt.Errorf("the list of distros %s: %w", address, err)
	}
	l, err := Parse(text)
	if err != nil {
		return List{}, fmt.Errorf("%s: %w", address, err)
	}
	return l, nil
}

func read(ctx context.Context, address string) ([]byte, error) {
	u, err := url.Parse(address)
	if err != nil {
		return nil, err
	}
	var body io.ReadCloser
	switch u.Scheme {
	case "file":
		body, err = os.Open(u.Path)
		if err != nil {
			return nil, err
		}
	case "http", "https":
		ctx, cancel := context.WithTimeout(ctx, timeout)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
		if err != nil {
			return nil, err
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return nil, err
		}
		body = resp.Body
		if resp.StatusCode != http.StatusOK {
			body.Close()
			return nil, fmt.Errorf("the server answers %s", resp.Status)
		}
	default:
		return nil, fmt.Errorf("want a URL with https:// or file://")
	}
	defer body.Close()
	text, err := io.ReadAll(io.LimitReader(body, maxList+1))
	if err == nil && len(text) > maxList {
		err = fmt.Errorf("it has more than %d bytes", maxList)
	}
	return text, err
}

// Find returns the entry that a name means, ignoring case: an entry's own name, or
// a flavor's, which stands for its default.
func (l List) Find(name string) (Distro, bool) {
	for _, d := range l.Distros {
		if strings.EqualFold(d.Name, name) {
			return d, true
		}
	}
	var first *Distro
	for i, d := range l.Distros {
		if !strings.EqualFold(d.Flavor, name) {
			continue
		}
		if d.Default {
			return d, true
		}
		if first == nil {
			first = &l.Distros[i]
		}
	}
	if first == nil {
		return Distro{}, false
	}
	return *first, true
}

// perFlavor is how many versions of a flavor a short list shows.
const perFlavor = 4

// Short is the list without a flavor's older versions.
func (l List) Short() []Distro {
	n := map[string]int{}
	var short []Distro
	for _, d := range l.Distros {
		if n[d.Flavor]++; n[d.Flavor] <= perFlavor {
			short = append(short, d)
		}
	}
	return short
}
