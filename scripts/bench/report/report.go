// Package report holds the figures of a benchmark and prints them beside their
// peers and bars.
package report

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"text/tabwriter"
)

// Row is one figure: ours and, measured in the same run, those of the peers.
type Row struct {
	Row   string             `json:"row"`
	Unit  string             `json:"unit"` // ms, µs, MB, MB/s, ...
	Ours  float64            `json:"ours"`
	Peers map[string]float64 `json:"peers"`
	// Bar is what is asked of Ours; nil if nothing is.
	Bar *Bar `json:"bar,omitempty"`
	// Missing says of peers that could not be measured why.
	Missing map[string]string `json:"missing,omitempty"`
}

// Bar is a limit for a row's figure: Factor times the figure of Peer, or if that
// is empty Factor itself. Ours may not be above it, with AtLeast not below.
type Bar struct {
	Peer    string  `json:"peer,omitempty"`
	Factor  float64 `json:"factor"`
	AtLeast bool    `json:"atLeast,omitempty"`
}

// Limit is the bar as a number of the row's unit.
func (r Row) Limit() float64 {
	if r.Bar.Peer == "" {
		return r.Bar.Factor
	}
	return r.Bar.Factor * r.Peers[r.Bar.Peer]
}

// Met tells whether the row's figure meets its bar.
func (r Row) Met() bool {
	if r.Bar.AtLeast {
		return r.Ours >= r.Limit()
	}
	return r.Ours <= r.Limit()
}

// Write writes a topic's rows to dir/TOPIC.json.
func Write(dir, topic string, rows []Row) error {
	for i := range rows {
		if rows[i].Peers == nil {
			rows[i].Peers = map[string]float64{}
		}
	}
	text, err := json.MarshalIndent(rows, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, topic+".json"), append(text, '\n'), 0o644)
}

// Read is the inverse of Write.
func Read(dir, topic string) (rows []Row, err error) {
	path := filepath.Join(dir, topic+".json")
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(text, &rows); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return rows, nil
}

// Print writes a topic's rows as a table.
func Print(w io.Writer, topic string, rows []Row) {
	fmt.Fprintf(w, "\n== %s\n", topic)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, r := range rows {
		names := make([]string, 0, len(r.Peers))
		for name := range r.Peers {
			names = append(names, name)
		}
		sort.Strings(names)
		var peers []string
		for _, name := range names {
			peers = append(peers, name+" "+figure(r.Peers[name]))
		}
		fmt.Fprintf(t, "%s\t%s %s\t%s\t%s\n", r.Row, figure(r.Ours), r.Unit, strings.Join(peers, ", "), r.verdict())
	}
	t.Flush()
	said := map[string]bool{}
	for _, r := range rows {
		for name, why := range r.Missing {
			if line := fmt.Sprintf("%s was not measured: %s", name, why); !said[line] {
				said[line] = true
				fmt.Fprintln(w, line)
			}
		}
	}
}

func (r Row) verdict() string {
	if r.Bar == nil {
		return ""
	}
	word, side := "missed", "at most"
	if r.Met() {
		word = "met"
	}
	if r.Bar.AtLeast {
		side = "at least"
	}
	return fmt.Sprintf("bar %s %s %s: %s", side, figure(r.Limit()), r.Unit, word)
}

// figure writes a number with three digits or more.
func figure(v float64) string {
	switch {
	case v >= 1000 || v == float64(int64(v)):
		return fmt.Sprintf("%.0f", v)
	case v >= 100:
		return fmt.Sprintf("%.1f", v)
	case v >= 1:
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.3f", v)
}
