package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/streaming-snapshotter/streaming-snapshotter/cmd/tomlfile"
)

// preferences are what flags say that are not given: the environment's, or else those of the file that `streamctl configure` writes.
type preferences struct {
	Registry  string `toml:"registry" json:"registry"`
	Server    string `toml:"server" json:"server"`
	TokenFile string `toml:"token_file" json:"token_file"`
	ServerCA  string `toml:"server_ca" json:"server_ca"`
}

// preference is a key of preferences.
type preference struct {
	key, flag, env, usage string
	of                    func(*preferences) *string
}

// tokenEnv has the token itself, for machines that keep no files.
const tokenEnv = "STREAMCTL_TOKEN"

func allPreferences() []preference {
	return []preference{
		{"registry", "registry", "STREAMCTL_REGISTRY", "host of the registry of images that are named REPO:TAG", func(p *preferences) *string { return &p.Registry }},
		{"server", "server", "STREAMCTL_SERVER", "URL of the conversion service", func(p *preferences) *string { return &p.Server }},
		{"token_file", "token-file", "STREAMCTL_TOKEN_FILE", "file of the token for the conversion service", func(p *preferences) *string { return &p.TokenFile }},
		{"server_ca", "server-ca", "STREAMCTL_SERVER_CA", "PEM file of certificates to trust for the conversion service, beside the system's", func(p *preferences) *string { return &p.ServerCA }},
	}
}

// preferencesFile is in the user's configuration directory, ~/.config if the environment says nothing else.
func preferencesFile() (string, error) {
	dir, err := os.UserConfigDir()
	if err != nil {
		return "", fmt.Errorf("where to keep defaults: %w", err)
	}
	return filepath.Join(dir, "streamctl", "config.toml"), nil
}

// readPreferences reads the file. None is no error, and nor is no place for one.
func readPreferences() (p preferences, err error) {
	name, err := preferencesFile()
	if err != nil {
		return p, nil
	}
	b, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return p, nil
	}
	if err != nil {
		return p, err
	}
	return p, tomlfile.Decode(name, b, &p, "streamctl configure --list", preferences{Registry: "registry.example.com", Server: "https://streaming.example.com", TokenFile: "/etc/token", ServerCA: "/etc/ca.pem"})
}

// effective returns what counts where a flag is not given.
func effective() (preferences, error) {
	p, err := readPreferences()
	for _, k := range allPreferences() {
		if v, ok := os.LookupEnv(k.env); ok {
			*k.of(&p) = v
		}
	}
	return p, err
}

// writePreferences replaces the file: only the user may read it, for a path may be as telling as a token.
func writePreferences(p preferences) (err error) {
	name, err := preferencesFile()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(name), ".config-*") // 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	err = tomlfile.Write(f, p)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), name)
}

func newConfigure() *cobra.Command {
	var (
		given  preferences
		output outputFlag
		list   bool
	)
	cmd := &cobra.Command{
		Use:   "configure",
		Short: "Keep defaults: registry, conversion service, token file",
		Long: `Keep defaults in a file of the user: those that are given; an empty one is forgotten.

A flag of a command counts more than the environment, and that more than this file. --list shows what counts, and whence it is.`,
		Args: exactly(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := readPreferences()
			if err != nil {
				return err
			}
			changed := false
			for _, k := range allPreferences() {
				if cmd.Flags().Changed(k.flag) {
					changed, *k.of(&p) = true, *k.of(&given)
				}
			}
			if changed {
				if p.TokenFile, err = absolute(p.TokenFile); err != nil {
					return err
				}
				if p.ServerCA, err = absolute(p.ServerCA); err != nil {
					return err
				}
				if err := checkServer(p.Server); err != nil {
					return err
				}
				if err := writePreferences(p); err != nil {
					return err
				}
			}
			if !changed && !list {
				return usage("configure: nothing to keep is given: --registry, --server, --token-file, --server-ca, or --list")
			}
			if list {
				return listPreferences(cmd, p, output)
			}
			return nil
		},
	}
	for _, k := range allPreferences() {
		cmd.Flags().StringVar(k.of(&given), k.flag, "", k.usage)
	}
	cmd.Flags().BoolVar(&list, "list", false, "print what counts, and whence it is")
	output.add(cmd)
	return cmd
}

// absolute makes a path in the file mean the same wherever streamctl is called.
func absolute(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	return filepath.Abs(path)
}

// listed is a row of configure --list.
type listed struct {
	Key    string `json:"key"`
	Value  string `json:"value"`
	Source string `json:"source"` // "" without a value
}

func listPreferences(cmd *cobra.Command, file preferences, output outputFlag) error {
	name, err := preferencesFile()
	if err != nil {
		return err
	}
	var rows []listed
	for _, k := range allPreferences() {
		r := listed{Key: k.key, Value: *k.of(&file)}
		if r.Value != "" {
			r.Source = name
		}
		if v, ok := os.LookupEnv(k.env); ok {
			r.Value, r.Source = v, k.env
		}
		rows = append(rows, r)
		if k.key == "token_file" && os.Getenv(tokenEnv) != "" {
			rows = append(rows, listed{"token", "(not shown)", tokenEnv})
		}
	}
	if output.json() {
		return writeJSON(cmd.OutOrStdout(), map[string]any{"defaults": rows})
	}
	t := newTable(cmd.OutOrStdout())
	fmt.Fprintln(t, "KEY\tVALUE\tFROM")
	for _, r := range rows {
		fmt.Fprintf(t, "%s\t%s\t%s\n", r.Key, dash(r.Value), dash(r.Source))
	}
	return t.Flush()
}

// dash stands for nothing in a table.
func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
