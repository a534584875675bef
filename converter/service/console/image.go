package console

import (
	"errors"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/access"
)

// imageBody is what the pages of an image show.
type imageBody struct {
	service.ImageInfo
	Name      string // "team/app:v1"
	Ref       string // as the path has it
	Badge     badge
	Streaming int // platforms with an artifact
	Possible  int // platforms that can have one: Linux
	Size      int64
	Platforms []platformView
	Referrers []referrerRow
	Last      *operationView
	Ongoing   bool
	MayCreate bool
	MayDelete bool
	PullOnly  bool
	Tab       string
	Tabs      []tab
	Paths     imagePaths
	Maps      []startMap // of the tab "start"
}

type imagePaths struct{ Image, Create, Delete, Repository, Subject string }

type tab struct {
	Text, Path string
	Current    bool
	Count      int // -1: none is shown
}

// platformView is a platform of an image.
type platformView struct {
	service.PlatformInfo
	ID    string
	Badge badge
	Linux bool
	Times *timesView // nil: no node has reported a start
}

// referrerRow is a row of the referrers, of the image itself or of a platform of it.
type referrerRow struct {
	service.ReferrerInfo
	Of   string // "the image", or the platform
	Kind string // what it is, for people; "" when that is not known
}

// look fetches an image for its pages.
func (c *Console) look(r *http.Request, at place) (imageBody, error) {
	info, err := c.Service.Image(r.Context(), at.Registry, at.Repository, at.Ref)
	if err != nil {
		return imageBody{}, err
	}
	registry, _ := c.registryInfo(at.Registry)
	b := imageBody{
		ImageInfo: info, Ref: at.Ref, Name: imageName(at.Repository, tagOf(at.Ref), info.Digest), PullOnly: registry.PullOnly,
		Paths: imagePaths{
			Image: imagePath(at.Registry, at.Repository, at.Ref), Create: imagePath(at.Registry, at.Repository, at.Ref, "create"),
			Delete: imagePath(at.Registry, at.Repository, at.Ref, "delete"), Repository: repositoryPath(at.Registry, at.Repository),
			Subject: imagePath(at.Registry, at.Repository, info.Subject.String()),
		},
	}
	for _, ref := range info.Referrers {
		b.Referrers = append(b.Referrers, referrer(ref, "the image"))
	}
	for i, p := range info.Platforms {
		v := platformView{PlatformInfo: p, ID: "platform-" + strconv.Itoa(i+1), Linux: strings.HasPrefix(p.Platform, "linux/"), Times: timesOfPlatform(p)}
		switch {
		case p.Streaming != nil:
			b.Streaming++
			v.Badge = badge{"Streaming", "bolt", "good"}
		case v.Linux:
			v.Badge = badge{"Not streaming", "off", "quiet"}
		default:
			v.Badge = badge{"Cannot stream: Linux only", "slash", "quiet"}
		}
		if v.Linux {
			b.Possible++
		}
		b.Size += p.Size
		b.Platforms = append(b.Platforms, v)
		for _, ref := range p.Referrers {
			b.Referrers = append(b.Referrers, referrer(ref, p.Platform))
		}
	}
	if info.Last != nil {
		v := c.operationView(r, *info.Last)
		v.From = "image"
		b.Last, b.Ongoing = &v, v.Ongoing
	}
	b.Badge = b.badge()
	b.MayCreate = b.Possible > 0 && !b.Ongoing && !b.PullOnly && may(r, access.Writer, at)
	b.MayDelete = b.Streaming > 0 && !b.Ongoing && !b.PullOnly && may(r, access.Owner, at)
	return b, nil
}

func (b *imageBody) badge() badge {
	switch {
	case b.Ongoing:
		return badge{"Converting", "running", "busy"}
	case b.Streaming > 0 && b.Streaming == b.Possible:
		return badge{"Streaming", "bolt", "good"}
	case b.Streaming > 0:
		return badge{"Streaming on " + plural(b.Streaming, "platform") + " of " + count(b.Possible), "half", "warn"}
	}
	return badge{"Not streaming", "off", "quiet"}
}

// tagOf is the reference if it is a tag.
func tagOf(ref string) string {
	if strings.Contains(ref, ":") {
		return ""
	}
	return ref
}

// kinds are the types of artifacts that people know by other names, by the beginning of their media type. First fit.
var kinds = []struct{ prefix, kind string }{
	{"application/vnd.streaming-snapshotter.profile", "Profile of a start"},
	{"application/vnd.streaming-snapshotter", "Streaming artifact"},
	{"application/vnd.azure.artifact.streaming", "Azure streaming artifact"},
	{"application/vnd.dev.cosign", "Signature (cosign)"},
	{"application/vnd.dev.sigstore", "Signature (sigstore)"},
	{"application/vnd.cncf.notary", "Signature (Notary)"},
	{"application/spdx", "SBOM (SPDX)"},
	{"text/spdx", "SBOM (SPDX)"},
	{"application/vnd.cyclonedx", "SBOM (CycloneDX)"},
	{"application/vnd.in-toto", "Attestation (in-toto)"},
	{"application/sarif", "Scan report (SARIF)"},
}

func referrer(ref service.ReferrerInfo, of string) referrerRow {
	row := referrerRow{ReferrerInfo: ref, Of: of}
	for _, k := range kinds {
		if strings.HasPrefix(ref.ArtifactType, k.prefix) {
			row.Kind = k.kind
			break
		}
	}
	return row
}

func (c *Console) image(w http.ResponseWriter, r *http.Request, at place) error {
	return c.showImage(w, r, at, "overview", http.StatusOK, "")
}

func (c *Console) start(w http.ResponseWriter, r *http.Request, at place) error {
	return c.showImage(w, r, at, "start", http.StatusOK, "")
}

func (c *Console) referrers(w http.ResponseWriter, r *http.Request, at place) error {
	return c.showImage(w, r, at, "referrers", http.StatusOK, "")
}

// showImage writes one tab of an image's page.
func (c *Console) showImage(w http.ResponseWriter, r *http.Request, at place, name string, status int, alert string) error {
	b, err := c.look(r, at)
	if err != nil {
		return err
	}
	b.Tab = name
	b.Tabs = []tab{
		{"Overview", b.Paths.Image, name == "overview", -1},
		{"What a start reads", b.Paths.Image + "/start", name == "start", -1},
		{"Referrers", b.Paths.Image + "/referrers", name == "referrers", len(b.Referrers)},
	}
	title := b.Name
	for _, t := range b.Tabs[1:] {
		if t.Current {
			title = t.Text + " · " + b.Name
		}
	}
	if name == "start" {
		for _, p := range b.Platforms {
			b.Maps = append(b.Maps, mapOf(p))
		}
	}
	return c.show(w, r, "image", status, page{
		Title: title, Heading: b.Name, Section: "registries", Alert: alert, Refresh: b.Ongoing, Crumbs: c.imageCrumbs(at, b), Body: b,
	})
}

// imageCrumbs is the way to an image; its last step has no path.
func (c *Console) imageCrumbs(at place, b imageBody) []crumb {
	tail := strings.TrimLeft(strings.TrimPrefix(b.Name, at.Repository), ":@")
	return []crumb{{"Registries", "/registries"}, {at.Registry, registryPath(at.Registry)}, {at.Repository, b.Paths.Repository}, {tail, ""}}
}

// asked is the image that a form was sent for: by digest, so that what was looked at is what is meant, whatever the tag names now.
func asked(r *http.Request, at place) (service.Image, error) {
	d, err := digest.Parse(r.PostForm.Get("digest"))
	if err != nil {
		return service.Image{}, errForm
	}
	return service.Image{Registry: at.Registry, Repository: at.Repository, Digest: d}, nil
}

func (c *Console) create(w http.ResponseWriter, r *http.Request, at place) error {
	image, err := asked(r, at)
	if err != nil {
		return err
	}
	if err := c.need(r, access.Writer, "convert", at); err != nil {
		return err
	}
	req := service.Request{Image: image, Tag: tagOf(at.Ref), Force: r.PostForm.Get("force") == "true", By: access.From(r.Context()).Name}
	if list := r.PostForm["platform"]; len(list) > 0 && r.PostForm.Get("platforms") == "chosen" {
		if slices.ContainsFunc(list, func(p string) bool { return !linuxPlatform.MatchString(p) }) {
			return errForm
		}
		req.Platforms = list
	}
	op, existed, err := c.Service.Submit(r.Context(), req)
	if !errors.Is(err, service.ErrExists) {
		c.audit(r, "convert", at, image.Digest.String(), err)
	}
	var refused *converter.Error
	switch {
	case errors.Is(err, service.ErrExists):
		redirect(w, r, done(imagePath(at.Registry, at.Repository, at.Ref), "exists"))
	case errors.As(err, &refused):
		text := refused.Code.Message() + " " + advice(service.Operation{State: service.Failed, ErrorCode: refused.Code})
		return c.showImage(w, r, at, "overview", http.StatusUnprocessableEntity, text)
	case err != nil:
		return err
	case existed:
		redirect(w, r, done(operationPath(op.ID), "ongoing"))
	default:
		redirect(w, r, done(imagePath(at.Registry, at.Repository, at.Ref), "created"))
	}
	return nil
}

func (c *Console) confirmDelete(w http.ResponseWriter, r *http.Request, at place) error {
	if err := c.need(r, access.Owner, "delete", at); err != nil {
		return err
	}
	b, err := c.look(r, at)
	if err != nil {
		return err
	}
	crumbs := append(c.imageCrumbs(at, b), crumb{"Delete", ""})
	crumbs[3].Path = b.Paths.Image
	return c.show(w, r, "delete", http.StatusOK, page{
		Title: "Delete the streaming artifacts of " + b.Name + "?", Section: "registries", Crumbs: crumbs, Body: b,
	})
}

func (c *Console) delete(w http.ResponseWriter, r *http.Request, at place) error {
	image, err := asked(r, at)
	if err != nil {
		return err
	}
	if err := c.need(r, access.Owner, "delete", at); err != nil {
		return err
	}
	gone, err := c.Service.DeleteArtifacts(r.Context(), image, access.From(r.Context()).Name)
	c.audit(r, "delete", at, image.Digest.String(), err)
	if err != nil {
		return err
	}
	notice := "deleted"
	if len(gone) == 0 {
		notice = "none"
	}
	redirect(w, r, done(imagePath(at.Registry, at.Repository, at.Ref), notice))
	return nil
}
