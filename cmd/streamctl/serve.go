package main

import (
	"github.com/spf13/cobra"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/streamctl/serve"
)

func newServe() *cobra.Command {
	var (
		config string
		print  bool
	)
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Be the conversion service: API, webhooks and console",
		Long: `Be the conversion service: it converts images on request and as they are pushed, for the registries that its configuration names.

--print-config prints every key of the configuration with its meaning, as it counts.`,
		Args: exactly(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := serve.Load(config)
			if err != nil {
				return err
			}
			if print {
				return c.Write(cmd.OutOrStdout())
			}
			return serve.Run(cmd.Context(), c, serve.Options{Version: version(), Stdout: cmd.OutOrStdout(), Log: c.Log(cmd.ErrOrStderr())})
		},
	}
	cmd.Flags().StringVar(&config, "config", "", "configuration file (default "+serve.DefaultConfig+" if it exists)")
	cmd.Flags().BoolVar(&print, "print-config", false, "print the configuration instead, with every key and its meaning")
	return cmd
}
