// Package reason is the closed list of reasons why an image is pulled in the normal way and not streamed: the same words in the log, the status, the metrics and
// in Kubernetes events.
//
// The principle: whoever finds out that an image is not streamed makes an Error with a code where it knows why; nobody reads an error's text. Nothing is in the
// list that no pull can meet. The package decides nothing and prints nothing.
package reason

import "errors"

// Code is one of the list. Its text is for programs and stays what it is.
type Code string

const (
	// NoLabels: containerd did not say which image the layer is of.
	NoLabels Code = "NO_LABELS"
	// NotListed: the configuration does not list the repository.
	NotListed Code = "NOT_LISTED"
	// PolicyOff: the configuration lists the repository, and its trust policy is off.
	PolicyOff Code = "POLICY_OFF"
	// Paused: an operator has said that nothing new is to be streamed.
	Paused Code = "PAUSED"
	// SafeMode: the daemon has failed to start too often and streams nothing new.
	SafeMode Code = "SAFE_MODE"
	// Stopping: the daemon was being stopped during the search.
	Stopping Code = "STOPPING"
	// NoArtifact: the registry answered, and has no streaming artifact of the image.
	NoArtifact Code = "NO_ARTIFACT"
	// Auth: the registry or its token server refused the credentials, or the lack of them: 401, 403.
	Auth Code = "AUTH"
	// Unreachable: no host of the registry answered, or only with errors that may pass.
	Unreachable Code = "REGISTRY_UNREACHABLE"
	// Timeout: the search took longer than it may, and no host has failed meanwhile.
	Timeout Code = "TIMEOUT"
	// BadAnswer: a host answered to something else than what was asked, or with what is no such thing: a list that does not end, a page of HTML.
	BadAnswer Code = "BAD_ANSWER"
	// Incomplete: a manifest, a config or an index that is referred to is not in the registry.
	Incomplete Code = "INCOMPLETE"
	// Damaged: bytes are not those of their digest, or the artifact is not valid, or not that image's.
	Damaged Code = "DAMAGED"
	// Tampered: the artifact's layers are not those that the image's config lists. It is in quarantine on this node.
	Tampered Code = "TAMPERED"
	// SignatureMissing: the repository's policy is signed, and no artifact of the image has a signature.
	SignatureMissing Code = "SIGNATURE_MISSING"
	// SignatureInvalid: a signature is malformed, wrong, or of something else.
	SignatureInvalid Code = "SIGNATURE_INVALID"
	// SignatureUntrusted: a signature is of nobody who is trusted: another authority's, or of another identity.
	SignatureUntrusted Code = "SIGNATURE_UNTRUSTED"
	// SignatureExpired: a signature or its certificate has run out, or has not begun.
	SignatureExpired Code = "SIGNATURE_EXPIRED"
	// SignatureRevoked: the certificate of a signature is revoked.
	SignatureRevoked Code = "SIGNATURE_REVOKED"
	// SignatureUnchecked: the node cannot say whether a signature is good.
	SignatureUnchecked Code = "SIGNATURE_UNCHECKED"
	// Unsupported: the artifact is of a version, has a feature or a size that this release does not know.
	Unsupported Code = "UNSUPPORTED_VERSION"
	// Content: something in the image itself cannot be shown as containerd would unpack it.
	Content Code = "IMAGE_CONTENT"
	// NodeFailure: something of this node failed: its disk, a mount, its configuration of registry hosts.
	NodeFailure Code = "NODE_FAILURE"
)

// All returns the list, in the order in which a pull meets them.
func All() []Code {
	return []Code{NoLabels, NotListed, PolicyOff, Paused, SafeMode, Stopping, NoArtifact, Auth, Unreachable, Timeout, BadAnswer, Incomplete, Damaged, Tampered,
		SignatureMissing, SignatureInvalid, SignatureUntrusted, SignatureExpired, SignatureRevoked, SignatureUnchecked, Unsupported, Content, NodeFailure}
}

// Remedy says in one sentence what to do about it.
func (c Code) Remedy() string {
	switch c {
	case NoLabels:
		return "set enable_remote_snapshot_annotations in the proxy plugin's exports, or disable_snapshot_annotations = false; `streaming-snapshotter check` says which"
	case NotListed:
		return "list the repository under `stream` in the configuration, and restart the daemon"
	case PolicyOff:
		return "give the repository another policy under `trust` in the configuration, and restart the daemon"
	case Paused:
		return "`streaming-snapshotter resume`; remove the image and pull it again"
	case SafeMode:
		return "put right what `streaming-snapshotter status` shows, and restart the daemon"
	case Stopping:
		return "remove the image and pull it again"
	case NoArtifact:
		return "`streamctl create` makes one; remove the image and pull it again"
	case Auth:
		return "give the daemon credentials that may pull from the repository; `streaming-snapshotter check REF` says what each place had, and how it was refused"
	case Unreachable:
		return "see the registry's hosts in `streaming-snapshotter status`, and hosts.toml, which has `ca` for a certificate of your own authority"
	case Timeout:
		return "the registry is slow: see what the error names, or raise `resolve_timeout`, or for a large image that must be proven `pull_wait`"
	case BadAnswer:
		return "see what the error names: a proxy that answers for the registry, or referrers without end, of which old ones can be deleted"
	case Incomplete:
		return "the registry has lost a part of the artifact, or retention removed it: `streamctl create --force`"
	case Damaged:
		return "`streamctl verify` says more, and `streamctl create --force` replaces it; a mirror may be what is damaged"
	case Tampered:
		return "`streamctl verify` proves what is in the registry: find out who may push there, and replace the artifact; `streaming-snapshotter quarantine` lists what this node refuses"
	case SignatureMissing:
		return "`streamctl sign` signs the artifact that is there, `streamctl create --sign` makes and signs one"
	case SignatureInvalid:
		return "sign again, and find out who may push to the repository: somebody may have tampered with it"
	case SignatureUntrusted:
		return "sign with a certificate that the node trusts, or add its authority to the trust store, or its subject to `trustedIdentities`, in `notation_dir`"
	case SignatureExpired:
		return "sign again; the error has the node's time, which may be what is wrong"
	case SignatureRevoked:
		return "take the artifact for hostile; sign with another certificate"
	case SignatureUnchecked:
		return "see the error: a statement for the repository in trustpolicy.json, a plugin, a server that says what is revoked"
	case Unsupported:
		return "the artifact was made by a newer streamctl: upgrade the node; or, as the error says then, it is too large, which leaves the normal pull"
	case Content:
		return "the image stays with the normal pull; the error names the layer and the file"
	}
	return "see the error: a full disk, a mount that is refused, a hosts.toml that cannot be read"
}

// Error is an error with its code. Its text is the error's.
type Error struct {
	Code Code
	Err  error
}

func (e *Error) Error() string { return e.Err.Error() }
func (e *Error) Unwrap() error { return e.Err }

// New gives err a code, unless it has one.
func New(c Code, err error) error {
	if has := (*Error)(nil); errors.As(err, &has) {
		return err
	}
	return &Error{c, err}
}

// Of returns the code of err. What nobody gave one is NodeFailure.
func Of(err error) Code {
	if e := (*Error)(nil); errors.As(err, &e) {
		return e.Code
	}
	return NodeFailure
}
