package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/wsl2/wsl2/cmd/internal/cmdline"
	"github.com/wsl2/wsl2/images/archive"
)

// completion prints a script for a shell. Distros are asked for when they are
// completed; everything else stands in the script.
func completion(c *command) error {
	var script string
	switch shell := c.Args().First(); shell {
	case "bash":
		script = bashCompletion()
	case "zsh":
		script = zshCompletion()
	case "fish":
		script = fishCompletion()
	default:
		return cmdline.Usagef("completion %s: want bash, zsh or fish", shell)
	}
	_, err := fmt.Fprint(c.app.out, script)
	return err
}

// takesDistro are the options and verbs whose value is a distro's name.
var takesDistro = []string{"-d", "--distribution", "-t", "--terminate", "-s", "--set-default", "--unregister", "--export", "--manage", "--set-version", "ps", "ssh-proxy"}

// takesFile are the verbs behind which files are completed.
var takesFile = []string{"--import", "--import-in-place", "--export", "--mount", "--unmount"}

// topWords are what a command line may begin with.
func topWords() []string {
	var words []string
	for _, o := range cmdline.RunOptions {
		words = append(words, o.Names...)
	}
	for _, v := range cmdline.Verbs {
		if !v.Hidden {
			words = append(append(words, v.Long), v.Also...)
		}
	}
	return words
}

// optionWords are a verb's options.
func optionWords(v *cmdline.Verb) []string {
	words := []string{"--help"}
	for _, o := range v.Options {
		words = append(words, "--"+o.Long)
		if o.Short != "" {
			words = append(words, "-"+o.Short)
		}
	}
	return words
}

func bashCompletion() string {
	var cases strings.Builder
	for i := range cmdline.Verbs {
		if v := &cmdline.Verbs[i]; !v.Hidden && len(v.Options) > 0 {
			files := ""
			if slices.Contains(takesFile, v.Long) {
				files = "[[ $cur == -* ]] || return; "
			}
			fmt.Fprintf(&cases, "        %s) %swords=%q ;;\n", strings.Join(append([]string{v.Long}, v.Also...), "|"), files, strings.Join(optionWords(v), " "))
		}
	}
	return fmt.Sprintf(`# bash completion for wsl2: eval "$(wsl2 completion bash)"
_wsl2() {
  local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} words=
  COMPREPLY=()
  [[ $cur != -* ]] || prev= # an option is nobody's value
  case $prev in
    %s) words=$(wsl2 --list --quiet 2>/dev/null) ;;
    --accel) words="auto kvm tcg" ;;
    --shell-type) words="standard login none" ;;
    --format) words="%s" ;;
    --kernel|--move|--location) return ;; # file names
    completion) words="bash zsh fish" ;;
    *)
      case ${COMP_WORDS[1]} in
%s        *) words=%q ;;
      esac ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$cur"))
}
complete -o default -F _wsl2 wsl2
`, strings.Join(takesDistro, "|"), strings.Join(archive.ExportFormats, " "), cases.String(), strings.Join(topWords(), " "))
}

// zshCompletion is bash's script, which zsh reads: one table, one behaviour.
func zshCompletion() string {
	return "# zsh completion for wsl2: eval \"$(wsl2 completion zsh)\"\nautoload -U +X bashcompinit && bashcompinit\n" + bashCompletion()
}

func fishCompletion() string {
	const distros = "(wsl2 --list --quiet 2>/dev/null)"
	var b strings.Builder
	b.WriteString("# fish completion for wsl2: wsl2 completion fish | source\n")
	quote := func(s string) string {
		return "'" + strings.NewReplacer(`\`, `\\`, "'", `\'`, "\n", " ").Replace(s) + "'"
	}
	add := func(names []string, value, help string) {
		b.WriteString("complete -c wsl2")
		for _, n := range names {
			switch {
			case strings.HasPrefix(n, "--"):
				b.WriteString(" -l " + n[2:])
			case strings.HasPrefix(n, "-"):
				b.WriteString(" -s " + n[1:])
			default:
				b.WriteString(" -n __fish_use_subcommand -a " + n)
			}
		}
		switch {
		case value == "DISTRO":
			b.WriteString(" -x -a '" + distros + "'")
		case value != "":
			b.WriteString(" -x -a " + quote(value))
		}
		fmt.Fprintf(&b, " -d %s\n", quote(help))
	}
	distro := map[string]bool{}
	for _, n := range takesDistro {
		distro[n] = true
	}
	for _, o := range cmdline.RunOptions {
		value := map[string]string{"--accel": "auto kvm tcg", "--shell-type": "standard login none"}[o.Long]
		if distro[o.Long] {
			value = "DISTRO"
		}
		add(o.Names, value, o.Help)
	}
	for _, v := range cmdline.Verbs {
		if v.Hidden {
			continue
		}
		value, seen := "", "__fish_contains_opt "+strings.TrimLeft(v.Long, "-")
		switch {
		case strings.HasPrefix(v.Long, "-"):
			if distro[v.Long] {
				value = "DISTRO"
			}
		default:
			seen = "__fish_seen_subcommand_from " + v.Long
			words := map[string]string{"completion": "bash zsh fish"}[v.Long]
			if distro[v.Long] {
				words = distros
			}
			if words != "" {
				fmt.Fprintf(&b, "complete -c wsl2 -n '%s' -x -a '%s'\n", seen, words)
			}
		}
		add(append([]string{v.Long}, v.Also...), value, v.Help)
		for _, o := range v.Options {
			b.WriteString("complete -c wsl2 -n '" + seen + "' -l " + o.Long)
			if o.Short != "" {
				b.WriteString(" -s " + o.Short)
			}
			if o.Long == "format" {
				b.WriteString(" -x -a " + quote(strings.Join(archive.ExportFormats, " ")))
			}
			fmt.Fprintf(&b, " -d %s\n", quote(o.Help))
		}
	}
	return b.String()
}
