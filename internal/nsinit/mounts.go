package nsinit

import (
	"fmt"
	"strings"

	"github.com/moby/sys/mountinfo"
)

// MountsBelow returns what is mounted below a directory, whose path has no links, in the caller's mount
// namespace.
func MountsBelow(dir string) (points []string, err error) {
	list, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return !strings.HasPrefix(m.Mountpoint, dir+"/"), false
	})
	if err != nil {
		return nil, fmt.Errorf("look for mounts below %s: %w", dir, err)
	}
	for _, m := range list {
		points = append(points, m.Mountpoint)
	}
	return points, nil
}
