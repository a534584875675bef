// Package fs mounts images: the FUSE session, data devices, trees, and EROFS on top. It asks a Device for bytes and knows
// nothing of registries.
package fs

import "context"

// Device is an image's data device: the layers' tars of a chain laid end to end.
type Device interface {
	// ReadAt fills p from off and returns len(p), or less at the end of the device, or an error: context errors become
	// EINTR, all others EIO. Called from many goroutines.
	ReadAt(ctx context.Context, p []byte, off int64) (int, error)
	Size() int64
}

// Mode is a way to mount.
type Mode string

const (
	ModeAuto Mode = "auto"
	ModeFile Mode = "file" // file-backed EROFS
	ModeLoop Mode = "loop" // EROFS over loop devices
	ModeTree Mode = "tree" // the tree served through FUSE
)

// Image is what a mount needs.
type Image struct {
	ID       string // file name of its data device: [a-z0-9]+, unique
	Metadata string // path of the metadata image
	Device   Device
}

// Server mounts images.
type Server struct{}

// Options of a Server.
type Options struct {
	Dir  string // where the FUSE of the data devices is mounted; created
	Mode Mode   // ModeAuto probes
}

// New validates o, probes if asked, and returns a Server. Run does the serving.
func New(o Options) (*Server, error) { panic("todo") }

// Mode returns the mode in use, and, for ModeAuto, why the better ones were not taken.
func (s *Server) Mode() (Mode, string) { panic("todo") }

// Mount mounts img read-only at target, an existing directory. Several mounts may share a Device by the same ID.
func (s *Server) Mount(ctx context.Context, img Image, target string) error { panic("todo") }

// Unmount undoes Mount. Unmounting what is not mounted is no error.
func (s *Server) Unmount(target string) error { panic("todo") }

// Close unmounts everything and ends the sessions.
func (s *Server) Close() error { panic("todo") }
