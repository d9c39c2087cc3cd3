package cmdline

// Verbs that are processes of wsl2 itself, which it starts.
const (
	Service = "service"
	VM      = "vm"
)

var jsonOption = Option{Long: "json", Help: "as JSON, for programs"}

// Verbs in the order of the help.
var Verbs = []Verb{
	{Long: "--list", Also: []string{"-l"}, Help: "list the distros", Options: []Option{
		{Long: "verbose", Short: "v", Help: "with state and version"},
		{Long: "quiet", Short: "q", Help: "names only"},
		{Long: "running", Help: "only those that run"},
		{Long: "all", Help: "those being installed as well (the same here)"},
		jsonOption,
	}},
	{Long: "--import", Args: "NAME [DIR] FILE", Min: 2, Max: 3, Help: "make a distro from FILE, a tar of its root\n(plain, gzip, bzip2, xz or zstd; - is stdin)"},
	{Long: "--set-default", Also: []string{"-s", "--setdefault"}, Args: "NAME", Min: 1, Max: 1, Help: "make NAME the default distro"},
	{Long: "--terminate", Also: []string{"-t"}, Args: "NAME", Min: 1, Max: 1, Help: "stop a distro and all that runs in it"},
	{Long: "--unregister", Args: "NAME", Min: 1, Max: 1, Help: "delete a distro and its disk (asks first)", Options: []Option{
		{Long: "yes", Short: "y", Help: "do not ask"},
	}},
	{Long: "--shutdown", Help: "stop all distros and the VM", Options: []Option{
		{Long: "force", Short: "f", Help: "at once, without asking the guest"},
	}},
	{Long: "--status", Help: "what runs, and how", Options: []Option{jsonOption}},
	{Long: "doctor", Help: "check what wsl2 needs on this host", Options: []Option{
		{Long: "kvm", Help: "only whether KVM is usable, as exit status"},
		jsonOption,
	}},
	{Long: "ssh-config", Help: "print lines for ~/.ssh/config, by which ssh,\nscp, rsync and editors reach NAME.wsl2"},
	{Long: "ssh-proxy", Args: "NAME", Min: 1, Max: 1, Help: "speak SSH for a distro on stdin and stdout"},
	{Long: "completion", Args: "bash|zsh|fish", Min: 1, Max: 1, Help: "print a completion script for a shell"},
	{Long: "--version", Also: []string{"-v"}, Help: "print the version"},
	{Long: "--help", Also: []string{"-h"}, Help: "print this help"},
	{Long: Service, Hidden: true},
	{Long: VM, Hidden: true},
}
