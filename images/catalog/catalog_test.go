package catalog

import (
	"context"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const sample = `{"ModernDistributions": {
  "Ubuntu": [
    {"Name": "Ubuntu", "FriendlyName": "Ubuntu", "Default": true, "Amd64Url": {"Url": "https://example.invalid/u.wsl", "Sha256": "0xAB"}, "Arm64Url": {"Url": "x", "Sha256": "y"}},
    {"Name": "Ubuntu-24.04", "FriendlyName": "Ubuntu 24.04 LTS", "Default": false, "Amd64Url": {"Url": "https://example.invalid/u24.wsl", "Sha256": "cd"}},
    {"Name": "U3", "Amd64Url": {"Url": "a", "Sha256": ""}}, {"Name": "U4", "Amd64Url": {"Url": "a", "Sha256": ""}}, {"Name": "U5", "Amd64Url": {"Url": "a", "Sha256": ""}}],
  "arm": [{"Name": "armonly", "Arm64Url": {"Url": "x", "Sha256": "y"}}],
  "SUSE": [{"Name": "sles-15", "Amd64Url": {"Url": "a"}}, {"Name": "sles-16", "Default": true, "Amd64Url": {"Url": "b"}}]},
 "Default": "Ubuntu", "Distributions": [{"Name": "Legacy", "StoreAppId": "1"}]}`

func TestParse(t *testing.T) {
	l, err := Parse([]byte(sample))
	if err != nil || l.Default != "Ubuntu" || len(l.Distros) != 7 || len(l.Short()) != 6 {
		t.Fatalf("%+v, %v", l, err)
	}
	for name, want := range map[string]string{"ubuntu": "Ubuntu", "UBUNTU-24.04": "Ubuntu-24.04", "suse": "sles-16", "sles-15": "sles-15", "armonly": "", "Legacy": "", "": ""} {
		if d, ok := l.Find(name); d.Name != want || ok != (want != "") {
			t.Errorf("%s: %+v", name, d)
		}
	}
	if d, _ := l.Find("Ubuntu"); d.SHA256 != "ab" {
		t.Errorf("%+v", d)
	}
	for _, text := range []string{"", "[]", "{}", "<html>", `{"ModernDistributions": {}}`} {
		if _, err := Parse([]byte(text)); err == nil {
			t.Errorf("%q was taken", text)
		}
	}
	for _, d := range BuiltIn().Distros {
		if got, ok := BuiltIn().Find(strings.ToUpper(d.Name)); !ok || got != d || d.Image == "" {
			t.Errorf("%+v", d)
		}
	}
	if _, ok := BuiltIn().Find(BuiltIn().Default); !ok {
		t.Error("the default is not there")
	}
}

func TestLoad(t *testing.T) {
	path := filepath.Join(t.TempDir(), "DistributionInfo.json")
	if err := os.WriteFile(path, []byte(sample), 0o600); err != nil {
		t.Fatal(err)
	}
	s := httptest.NewServer(http.FileServer(http.Dir(filepath.Dir(path))))
	defer s.Close()
	for _, u := range []string{"file://" + path, s.URL + "/DistributionInfo.json"} {
		if l, err := Load(context.Background(), u); err != nil || len(l.Distros) != 7 {
			t.Errorf("%s: %v", u, err)
		}
	}
	for _, u := range []string{"file:///no/such", s.URL + "/nothing", path, "ftp://x/y", "://"} {
		if _, err := Load(context.Background(), u); err == nil || !strings.Contains(err.Error(), u) {
			t.Errorf("%s: %v", u, err)
		}
	}
	if err := os.WriteFile(path, make([]byte, maxList+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(context.Background(), "file://"+path); err == nil || !strings.Contains(err.Error(), "more than") {
		t.Error(err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(sample))
	f.Fuzz(func(t *testing.T, text []byte) {
		l, err := Parse(text)
		if err == nil && len(l.Distros) == 0 {
			t.Error("an empty list is none")
		}
		l.Find(l.Default)
		l.Short()
	})
}
