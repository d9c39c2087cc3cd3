package cmdline

import (
	"errors"
	"fmt"
	"io"

	"github.com/wsl2/wsl2/launcher/api"
)

// Fail tells the user why wsl2 failed, and what to do if that is known.
func Fail(w io.Writer, err error) {
	text := err.Error()
	var usage *UsageError
	var told *api.Error
	switch {
	case errors.As(err, &usage):
		text += "\nTry `wsl2 --help`."
	case errors.As(err, &told) && told.Hint != "":
		text = told.Text + "\nNext: " + told.Hint
	}
	fmt.Fprintf(w, "wsl2: %s\n", text)
}
