// Package ini reads the settings files of WSL: wslconfig on the host, /etc/wsl.conf and
// /etc/wsl-distribution.conf in a distro (WSL's configfile.cpp).
//
// '#' begins a comment, and so does ';' at the beginning of a line; [section], key = value.
// In quotes a value may have '#', and spaces around it; its escapes are \\ \" \n \t \b. A
// '\' at the end of a line goes on with the next. Sections and keys ignore case. A line
// that makes no sense is a problem, never an error.
package ini

import (
	"fmt"
	"strings"
)

// Entry is one setting.
type Entry struct {
	// Section and Key as they were written.
	Section, Key, Value string
	Line                int // from 1
}

// Name is "section.key", folded.
func (e Entry) Name() string { return strings.ToLower(e.Section + "." + e.Key) }

// Problem is a line that was passed over.
type Problem struct {
	Text string
	Line int
	// Name is the "section.key", folded, whose value was no use; "" if it was not that.
	Name string
}

// Parse reads a file. Of equal keys the first counts; the others are problems.
func Parse(text string) (entries []Entry, problems []Problem) {
	section := ""
	seen := map[string]bool{}
	lines := strings.Split(text, "\n")
	for i := 0; i < len(lines); i++ {
		at := i + 1
		problem := func(format string, a ...any) {
			problems = append(problems, Problem{Text: fmt.Sprintf(format, a...), Line: at})
		}
		line := strings.TrimSpace(lines[i])
		if i == 0 {
			line = strings.TrimPrefix(line, "\ufeff")
		}
		if line == "" || line[0] == '#' || line[0] == ';' {
			continue
		}
		comment := commentIn(line)
		for comment == len(line) && continued(line) && i+1 < len(lines) {
			i++
			line = line[:len(line)-1] + strings.TrimSpace(lines[i])
			comment = commentIn(line)
		}
		line = strings.TrimSpace(line[:comment])
		if line == "" { // nothing but a '\' that went on with an empty line
			continue
		}
		if line[0] == '[' {
			name, ok := strings.CutSuffix(line[1:], "]")
			if !ok {
				problem("Invalid section '%s'", line)
				continue
			}
			section = strings.TrimSpace(name)
			continue
		}
		key, value, ok := strings.Cut(line, "=")
		if !ok {
			problem("Expected 'key = value', found '%s'", line)
			continue
		}
		e := Entry{Section: section, Key: strings.TrimSpace(key), Line: at}
		var err error
		if e.Value, err = unquote(strings.TrimSpace(value)); err != nil {
			problem("%v for key '%s'", err, e.Key)
			problems[len(problems)-1].Name = e.Name()
			continue
		}
		if seen[e.Name()] {
			problem("Duplicated config key '%s.%s'", e.Section, e.Key)
			continue
		}
		seen[e.Name()] = true
		entries = append(entries, e)
	}
	return entries, problems
}

// continued tells whether a line ends in a '\' that is not itself escaped.
func continued(line string) bool {
	n := len(line) - len(strings.TrimRight(line, `\`))
	return n%2 == 1
}

// commentIn returns where the comment of a line begins, len(line) if it has none.
func commentIn(line string) int {
	quoted := false
	for i := 0; i < len(line); i++ {
		switch line[i] {
		case '\\':
			i++
		case '"':
			quoted = !quoted
		case '#':
			if !quoted {
				return i
			}
		}
	}
	return len(line)
}

// unquote drops the quotes and resolves escapes.
func unquote(v string) (string, error) {
	if !strings.ContainsAny(v, `\"`) {
		return v, nil
	}
	var b strings.Builder
	quoted := false
	for i := 0; i < len(v); i++ {
		switch v[i] {
		case '"':
			quoted = !quoted
			continue
		case '\\':
		default:
			b.WriteByte(v[i])
			continue
		}
		i++
		if i == len(v) {
			return "", fmt.Errorf(`Invalid escape '\'`) //nolint:staticcheck // WSL's words
		}
		switch v[i] {
		case '\\', '"':
			b.WriteByte(v[i])
		case 'n':
			b.WriteByte('\n')
		case 't':
			b.WriteByte('\t')
		case 'b':
			b.WriteByte('\b')
		default:
			return "", fmt.Errorf(`Invalid escape '\%c'`, v[i])
		}
	}
	if quoted {
		return "", fmt.Errorf(`Expected '"'`) //nolint:staticcheck // WSL's words
	}
	return b.String(), nil
}

// Unknown says that a key is none of those known, by their names ("wsl2.memory"),
// and which of them may have been meant.
func Unknown(e Entry, known []string) string {
	text := fmt.Sprintf("Unknown key '%s.%s'", e.Section, e.Key)
	best, distance := "", 4 // as far as a slip of the fingers goes
	for _, k := range known {
		if d := edits(strings.ToLower(k), e.Name()); d < distance || d == distance && best != "" && k < best {
			best, distance = k, d
		}
		// The right key in the wrong section.
		if _, key, ok := strings.Cut(strings.ToLower(k), "."); ok && key == strings.ToLower(e.Key) && distance > 1 {
			best, distance = k, 1
		}
	}
	if best != "" {
		text += fmt.Sprintf(" (did you mean '%s'?)", best)
	}
	return text
}

// maxName bounds what edits compares.
const maxName = 100

// edits is the Levenshtein distance of two names.
func edits(a, b string) int {
	if len(a) > maxName || len(b) > maxName {
		return maxName
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		diagonal := row[0]
		row[0] = i
		for j := 1; j <= len(b); j++ {
			d := diagonal
			if a[i-1] != b[j-1] {
				d++
			}
			diagonal = row[j]
			row[j] = min(d, row[j]+1, row[j-1]+1)
		}
	}
	return row[len(b)]
}

// Bool reads WSL's booleans.
func Bool(v string) (value, ok bool) {
	switch strings.ToLower(v) {
	case "true", "1":
		return true, true
	case "false", "0":
		return false, true
	}
	return false, false
}
