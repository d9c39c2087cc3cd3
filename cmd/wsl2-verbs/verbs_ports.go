package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"github.com/wsl2/wsl2/cmd/internal/cmdline"
	"github.com/wsl2/wsl2/launcher/api"
	"github.com/wsl2/wsl2/launcher/ports"
)

// This file is `wsl2 ports`.

// portsCall is what the options ask for.
func portsCall(c *command) (api.Call, error) {
	call := api.Call{Verb: api.VerbPorts, Unpublish: c.IsSet("unpublish")}
	if call.Unpublish && c.IsSet("publish") {
		return call, cmdline.Usagef("--publish and --unpublish exclude each other")
	}
	for _, o := range []string{"address", "allow"} {
		if c.IsSet(o) && !c.IsSet("publish") {
			return call, cmdline.Usagef("--%s goes with --publish", o)
		}
	}
	if c.Bool("follow") && (call.Unpublish || c.IsSet("publish")) {
		return call, cmdline.Usagef("--follow only lists")
	}
	for _, o := range []string{"publish", "unpublish"} {
		if !c.IsSet(o) {
			continue
		}
		r, err := ports.ParseRule(c.String(o))
		if err == nil {
			err = r.Restrict(c.String("address"), strings.FieldsFunc(c.String("allow"), func(x rune) bool { return x == ',' }))
		}
		if err != nil {
			return call, cmdline.Usagef("--%s %s: %v", o, c.String(o), err)
		}
		call.Publish = &r
	}
	return call, nil
}

func listPorts(c *command) error {
	call, err := portsCall(c)
	if err != nil {
		return err
	}
	cl, err := c.app.client()
	if err != nil {
		return err
	}
	var p api.Ports
	if err := cl.Call(call, &p, true); err != nil {
		return err
	}
	if r := call.Publish; r != nil && !c.Bool("json") {
		return c.published(*r, p)
	}
	for {
		if err := c.showPorts(p); err != nil || !c.Bool("follow") {
			return err
		}
		call.After, p = p.Serial, api.Ports{}
		if err := cl.Call(call, &p, true); err != nil {
			return err
		}
	}
}

// showPorts prints a table, or a line of JSON when there are more to come.
func (c *command) showPorts(p api.Ports) error {
	switch {
	case c.Bool("json") && c.Bool("follow"):
		return json.NewEncoder(c.app.out).Encode(p)
	case c.Bool("json"):
		return c.json(p)
	case len(p.Ports) == 0:
		_, err := fmt.Fprintln(c.app.out, "No distro serves a port that this host has.")
		return err
	}
	rows := [][]string{{"DISTRO", "PORT", "ON THIS HOST", ""}}
	for _, b := range p.Ports {
		rows = append(rows, []string{b.Distro, fmt.Sprintf("%d/%s", b.Port, b.Proto), strings.Join(b.Host, " "), b.Note})
	}
	return table(c.app.out, rows)
}

// table prints rows in columns, the last one as it is.
func table(w io.Writer, rows [][]string) error {
	width := make([]int, len(rows[0]))
	for _, r := range rows {
		for i, cell := range r {
			width[i] = max(width[i], len(cell))
		}
	}
	for _, r := range rows {
		var b strings.Builder
		for i, cell := range r[:len(r)-1] {
			fmt.Fprintf(&b, "%-*s  ", width[i], cell)
		}
		if _, err := fmt.Fprintln(w, strings.TrimRight(b.String()+r[len(r)-1], " ")); err != nil {
			return err
		}
	}
	return nil
}

// published says what became of a rule.
func (c *command) published(r ports.Rule, p api.Ports) error {
	if c.IsSet("unpublish") {
		_, err := fmt.Fprintf(c.app.out, "%v is no longer published.\n", r)
		return err
	}
	for _, b := range p.Ports {
		if strings.EqualFold(b.Distro, r.Distro) && b.Port == r.Port && (b.Proto == "udp") == r.UDP {
			if b.Note != "" {
				return fmt.Errorf("%v: %s", r, b.Note)
			}
			_, err := fmt.Fprintf(c.app.out, "%v is published at %s.\n", r, strings.Join(b.Host, " "))
			return err
		}
	}
	_, err := fmt.Fprintf(c.app.out, "%v will be published when %s serves it.\n", r, r.Distro)
	return err
}
