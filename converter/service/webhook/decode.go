package webhook

import (
	"encoding/json"
	"maps"
	"net/http"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/access"
)

// delivery is what a payload says.
type delivery struct {
	events []service.Event
	answer any // JSON that the sender expects; nil is none in particular
}

// decoder reads a payload. An error is for what the kind of source never sends; events that are about something else than images are
// none, and so are those that name something impossible.
type decoder func(s Source, header http.Header, body []byte) (delivery, error)

var decoders = map[string]decoder{
	"distribution": distribution,
	"harbor":       harbor,
	"acr":          acr,
	"eventgrid":    eventGrid,
	"zot":          zot,
	"ecr":          ecr,
	"gar":          gar,
	"jfrog":        jfrog,
	"dockerhub":    dockerHub,
}

// Kinds returns the kinds of sources that are known.
func Kinds() []string { return slices.Sorted(maps.Keys(decoders)) }

// add takes an event of the source, completed by its registry and kind, unless its repository is impossible. An impossible digest or tag
// is as if it were not told, since the other one says enough; without either the event is dropped, except the deletion of a repository.
func (d *delivery) add(s Source, e service.Event) {
	if service.CheckRepository(e.Repository) != nil {
		return
	}
	told := e.Tag != "" || e.Digest != ""
	if e.Tag == string(e.Digest) {
		e.Tag = ""
	}
	if !service.IsTag(e.Tag) {
		e.Tag = ""
	}
	if len(e.Digest) > 200 || e.Digest.Validate() != nil {
		e.Digest = ""
	}
	if e.Tag == "" && e.Digest == "" && (told || e.Kind == service.Pushed) {
		return
	}
	e.Registry, e.Source = s.Registry, s.Kind
	e.ID, e.By = access.Printable(e.ID, 128), access.Printable(e.By, 128)
	d.events = append(d.events, e)
}

// either takes a push or a deletion, by the words that the kind of source has for them.
func (d *delivery) either(s Source, e service.Event, action, pushed, deleted string) {
	switch action {
	case pushed:
		d.add(s, e)
	case deleted:
		e.Kind = service.Deleted
		d.add(s, e)
	}
}

// isManifest says whether a media type is one of what has tags: layers and configs are pushed, too.
func isManifest(mediaType string) bool {
	switch mediaType {
	case "application/vnd.oci.image.manifest.v1+json", "application/vnd.oci.image.index.v1+json",
		"application/vnd.docker.distribution.manifest.v2+json", "application/vnd.docker.distribution.manifest.list.v2+json":
		return true
	}
	return false
}

// record is an event of the CNCF's distribution, which Azure's registry sends as well.
type record struct {
	ID     string
	Action string
	Target struct {
		MediaType  string
		Digest     digest.Digest
		Repository string
		Tag        string
	}
	Actor struct{ Name string }
}

func (d *delivery) record(s Source, r record) {
	if r.Action == "push" && !isManifest(r.Target.MediaType) {
		return
	}
	e := service.Event{Repository: r.Target.Repository, Tag: r.Target.Tag, Digest: r.Target.Digest, ID: r.ID, By: r.Actor.Name}
	d.either(s, e, r.Action, "push", "delete")
}

// distribution reads notifications of the CNCF's distribution: https://distribution.github.io/distribution/about/notifications/
func distribution(s Source, _ http.Header, body []byte) (d delivery, err error) {
	var envelope struct{ Events []record }
	err = json.Unmarshal(body, &envelope)
	for _, r := range envelope.Events {
		d.record(s, r)
	}
	return d, err
}

// acr reads webhooks of Azure Container Registry: https://learn.microsoft.com/azure/container-registry/container-registry-webhook-reference
func acr(s Source, _ http.Header, body []byte) (d delivery, err error) {
	var r record
	err = json.Unmarshal(body, &r)
	d.record(s, r)
	return d, err
}

// eventGrid reads events of Azure Event Grid in its own schema and in that of CloudEvents, one or a list:
// https://learn.microsoft.com/azure/event-grid/event-schema-container-registry
// and answers the event that asks whether it is expected: https://learn.microsoft.com/azure/event-grid/end-point-validation-event-grid-events-schema
func eventGrid(s Source, _ http.Header, body []byte) (d delivery, err error) {
	type event struct {
		ID        string
		EventType string // of Event Grid's schema
		Type      string // of CloudEvents
		Data      struct {
			record
			ValidationCode string
		}
	}
	var events []event
	if body := strings.TrimSpace(string(body)); strings.HasPrefix(body, "{") {
		events = make([]event, 1)
		err = json.Unmarshal([]byte(body), &events[0])
	} else {
		err = json.Unmarshal([]byte(body), &events)
	}
	for _, e := range events {
		switch e.EventType + e.Type {
		case "Microsoft.EventGrid.SubscriptionValidationEvent":
			if code := e.Data.ValidationCode; len(code) <= 256 {
				d.answer = map[string]string{"validationResponse": code}
			}
		case "Microsoft.ContainerRegistry.ImagePushed", "Microsoft.ContainerRegistry.ImageDeleted":
			e.Data.ID = e.ID
			d.record(s, e.Data.record)
		}
	}
	return d, err
}

// ecr reads events of Amazon ECR that EventBridge sends to an API destination:
// https://docs.aws.amazon.com/AmazonECR/latest/userguide/ecr-eventbridge.html
func ecr(s Source, _ http.Header, body []byte) (d delivery, err error) {
	var event struct {
		ID         string
		DetailType string `json:"detail-type"`
		Source     string
		Account    string
		Region     string
		Detail     struct {
			Result     string
			Repository string        `json:"repository-name"`
			Digest     digest.Digest `json:"image-digest"`
			Action     string        `json:"action-type"`
			Tag        string        `json:"image-tag"`
		}
	}
	if err = json.Unmarshal(body, &event); err != nil {
		return d, err
	}
	// A rule may send on what happens in several accounts and regions, each with a registry of its own.
	if account, rest, ok := strings.Cut(s.Registry, ".dkr.ecr."); ok && (account != event.Account || !strings.HasPrefix(rest, event.Region+".")) {
		return d, nil
	}
	if event.DetailType != "ECR Image Action" || event.Source != "aws.ecr" || event.Detail.Result != "SUCCESS" {
		return d, nil
	}
	e := service.Event{Repository: event.Detail.Repository, Tag: event.Detail.Tag, Digest: event.Detail.Digest, ID: event.ID}
	d.either(s, e, event.Detail.Action, "PUSH", "DELETE")
	return d, nil
}

// dockerHub reads webhooks of Docker Hub, which say no digest: https://docs.docker.com/docker-hub/repos/manage/webhooks/
func dockerHub(s Source, _ http.Header, body []byte) (d delivery, err error) {
	var event struct {
		Push       struct{ Tag, Pusher string } `json:"push_data"`
		Repository struct {
			Name string `json:"repo_name"`
		}
	}
	err = json.Unmarshal(body, &event)
	if event.Push.Tag != "" {
		d.add(s, service.Event{Repository: event.Repository.Name, Tag: event.Push.Tag, By: event.Push.Pusher})
	}
	return d, err
}
