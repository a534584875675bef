package webhook

import (
	"encoding/json"
	"mime"
	"net/http"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
)

// harbor reads webhooks of Harbor in both of its formats:
// https://goharbor.io/docs/latest/working-with-projects/project-configuration/configure-webhooks/
func harbor(s Source, _ http.Header, body []byte) (d delivery, err error) {
	type data struct {
		Resources []struct {
			Digest digest.Digest
			Tag    string // the digest where it was pushed without one
		}
		Repository struct {
			Name string `json:"repo_full_name"`
		}
	}
	var event struct {
		ID       string // of CloudEvents
		Type     string
		Operator string
		Default  data `json:"event_data"`
		Data     data // of CloudEvents
	}
	err = json.Unmarshal(body, &event)
	e, about := service.Event{ID: event.ID, By: event.Operator}, event.Data
	switch event.Type {
	case "PUSH_ARTIFACT":
		about = event.Default
	case "harbor.artifact.pushed":
	case "DELETE_ARTIFACT":
		about, e.Kind = event.Default, service.Deleted
	case "harbor.artifact.deleted":
		e.Kind = service.Deleted
	default:
		return d, err
	}
	e.Repository = about.Repository.Name
	for _, r := range about.Resources {
		e.Tag, e.Digest = r.Tag, r.Digest
		d.add(s, e)
	}
	return d, err
}

// zot reads CloudEvents of zot's events extension, whose HTTP sink sends them in binary mode: https://zotregistry.dev/latest/articles/events/
// The types' prefix can be configured there.
func zot(s Source, header http.Header, body []byte) (d delivery, err error) {
	type data struct {
		Name      string
		Reference string
		Digest    digest.Digest
		Actor     struct{ Name string }
	}
	var event struct {
		ID   string
		Type string
		Data data
	}
	if t, _, _ := mime.ParseMediaType(header.Get("Content-Type")); t == "application/cloudevents+json" {
		err = json.Unmarshal(body, &event)
	} else {
		event.ID, event.Type = header.Get("Ce-Id"), header.Get("Ce-Type")
		err = json.Unmarshal(body, &event.Data)
	}
	about := event.Data
	e := service.Event{Repository: about.Name, Tag: about.Reference, Digest: about.Digest, ID: event.ID, By: about.Actor.Name}
	if strings.Contains(about.Reference, ":") { // it is a digest
		e.Tag, e.Digest = "", digest.Digest(about.Reference)
	}
	_, change, _ := strings.Cut(event.Type, ".image.")
	d.either(s, e, change, "updated", "deleted")
	return d, err
}

// gar reads notifications of Google's Artifact Registry and Container Registry that Pub/Sub pushes, wrapped or not:
// https://cloud.google.com/artifact-registry/docs/configure-notifications, https://cloud.google.com/pubsub/docs/push
func gar(s Source, header http.Header, body []byte) (d delivery, err error) {
	type change struct {
		Action string
		Digest string // HOST/REPOSITORY@DIGEST
		Tag    string // HOST/REPOSITORY:TAG
	}
	var envelope struct {
		change
		Message struct {
			ID   string `json:"messageId"`
			Data []byte // JSON of a change, in base 64
		}
	}
	if err = json.Unmarshal(body, &envelope); err != nil {
		return d, err
	}
	c, id := envelope.change, envelope.Message.ID
	if len(envelope.Message.Data) > 0 {
		if err = json.Unmarshal(envelope.Message.Data, &c); err != nil {
			return d, err
		}
	} else if id == "" {
		id = header.Get("X-Goog-Pubsub-Message-Id")
	}
	// A project's topic tells of its registries in all regions.
	e := service.Event{ID: id}
	if name, ok := strings.CutPrefix(c.Digest, s.Registry+"/"); ok {
		repository, dgst, _ := strings.Cut(name, "@")
		e.Repository, e.Digest = repository, digest.Digest(dgst)
	}
	if name, ok := strings.CutPrefix(c.Tag, s.Registry+"/"); ok {
		e.Repository, e.Tag, _ = strings.Cut(name, ":")
	}
	d.either(s, e, c.Action, "INSERT", "DELETE")
	return d, nil
}

// jfrog reads webhooks of JFrog Artifactory, those of the domain docker: https://docs.jfrog.com/administration/docs/event-types
// Older documentation shows the data without the object around it.
func jfrog(s Source, _ http.Header, body []byte) (d delivery, err error) {
	type data struct {
		Key    string `json:"repo_key"`
		Image  string `json:"image_name"`
		Tag    string
		SHA256 string // of the manifest
	}
	var event struct {
		Domain string
		Type   string `json:"event_type"`
		Data   *data
		data
	}
	err = json.Unmarshal(body, &event)
	about := event.data
	if event.Data != nil {
		about = *event.Data
	}
	if event.Domain != "docker" && event.Domain != "" || about.Image == "" {
		return d, err
	}
	e := service.Event{Repository: about.Image, Tag: about.Tag, Digest: digest.Digest("sha256:" + about.SHA256)}
	switch s.RepositoryKey {
	case "":
		e.Repository = about.Key + "/" + about.Image
	case about.Key:
	default:
		return d, err
	}
	d.either(s, e, event.Type, "pushed", "deleted")
	return d, err
}
