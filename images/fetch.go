package images

// FetchEvent is what wsl2-fetch tells its caller, as a line of JSON.
type FetchEvent struct {
	// Name is the distro's, when it is known; it comes before the archive.
	Name string `json:"name,omitempty"`
	// Done of Total bytes (0: not known) are here.
	Done  int64 `json:"done,omitempty"`
	Total int64 `json:"total,omitempty"`
	// Notice is for the user; Error ends it.
	Notice string `json:"notice,omitempty"`
	Error  string `json:"error,omitempty"`
}
