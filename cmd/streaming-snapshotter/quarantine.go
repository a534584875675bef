package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"text/tabwriter"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"github.com/streaming-snapshotter/streaming-snapshotter/snapshot/ledger"
)

func newQuarantineCommand(configFile *string) *cobra.Command {
	var clear, output string
	cmd := &cobra.Command{
		Use:   "quarantine",
		Short: "List the artifacts that this node refuses because they lie about the image, or take one out of quarantine",
		Long: `Lists the layers of streaming artifacts that are in quarantine: their tar, or what their index says of it, is not what the image's config promises.
Images of them are not read, mounted or pulled any more, over restarts, until somebody clears their index: "--clear INDEX", after "streamctl verify" has proven
the artifact, or to find out that it is proven wrong again.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			asJSON, err := isJSON(output)
			if err != nil {
				return err
			}
			root, method, path := configured(*configFile).Root, http.MethodGet, "/quarantine"
			if clear != "" {
				method, path = http.MethodPost, path+"?"+url.Values{"clear": {clear}}.Encode()
			}
			body, err := fromDaemon(cmd.Context(), method, root, path)
			if err != nil {
				return err
			}
			defer body.Close()
			list := []ledger.Quarantine{}
			if err := json.NewDecoder(body).Decode(&list); err != nil {
				return fmt.Errorf("ask %s: %w", adminSocket(root), err)
			}
			if asJSON {
				return sayJSON(cmd.OutOrStdout(), list, true)
			}
			printQuarantines(cmd.OutOrStdout(), list)
			return nil
		},
	}
	cmd.Flags().StringVar(&clear, "clear", "", "digest of the index to take out of quarantine")
	cmd.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	return cmd
}

func printQuarantines(w io.Writer, list []ledger.Quarantine) {
	if len(list) == 0 {
		say(w, "nothing is in quarantine\n")
		return
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "INDEX\tIMAGE\tARTIFACT\tSINCE\tSIGNED BY\tMADE BY, IT SAYS\tWHY")
	for _, q := range list {
		say(t, "%s\t%s@%s\t%s\t%s\t%s\t%s\t%s\n", q.Index, q.Repository, q.Manifest, q.Artifact, q.At.UTC().Format(time.RFC3339), cmp.Or(q.Signer, "-"), cmp.Or(q.Converter, "-"), q.Why)
	}
	t.Flush()
}

// quarantine answers with what is in quarantine, after it has taken out what is to be cleared.
func (a *admin) quarantine(w http.ResponseWriter, r *http.Request) {
	if a.n.images == nil || a.n.ledger == nil {
		http.Error(w, "nothing is proven in this process: it is in safe mode, or only mounts", http.StatusServiceUnavailable)
		return
	}
	if r.Method == http.MethodPost {
		index := digest.Digest(r.FormValue("clear"))
		_, there := a.n.ledger.Quarantined(index)
		switch {
		case index.Validate() != nil || !there:
			http.Error(w, fmt.Sprintf("index %q is not in quarantine", index), http.StatusNotFound)
			return
		default:
			if err := a.n.images.ClearQuarantine(index); err != nil {
				http.Error(w, err.Error(), http.StatusInternalServerError)
				return
			}
		}
	}
	_, list := a.n.ledger.List()
	if list == nil {
		list = []ledger.Quarantine{}
	}
	json.NewEncoder(w).Encode(list)
}
