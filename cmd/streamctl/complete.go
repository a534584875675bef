package main

import (
	"context"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service"
	"github.com/streaming-snapshotter/streaming-snapshotter/converter/service/client"
)

// completionTime bounds what a shell's Tab waits for the service.
const completionTime = 2 * time.Second

// completions says to each flag of each command below root what may follow it: the service's registries, repositories, tags and operations, if one is
// named and answers; otherwise nothing.
func completions(root *cobra.Command) {
	words := map[string][]string{
		"output": {"table", "json"}, "enable-streaming": {"true", "false"}, "state": stateNames(),
		"platform": {"linux/amd64", "linux/arm64"},
	}
	asked := map[string]func(context.Context, *client.Client, *cobra.Command, string) []string{
		"name": registries, "registry": registries, "repository": repositories, "image": images, "id": operations,
	}
	for _, cmd := range root.Commands() {
		completions(cmd)
		cmd.Flags().VisitAll(func(f *pflag.Flag) {
			complete := func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
				return words[f.Name], cobra.ShellCompDirectiveNoFileComp
			}
			switch ask := asked[f.Name]; {
			case ask != nil:
				complete = func(cmd *cobra.Command, _ []string, part string) ([]string, cobra.ShellCompDirective) {
					return fromService(cmd, part, ask)
				}
			case words[f.Name] == nil:
				return // a file's name, or whatever the shell thinks of
			}
			cmd.RegisterFlagCompletionFunc(f.Name, complete) // fails if there is one
		})
		if cmd.Flags().Lookup("image") != nil && cmd.ValidArgsFunction == nil {
			cmd.ValidArgsFunction = func(cmd *cobra.Command, args []string, part string) ([]string, cobra.ShellCompDirective) {
				if len(args) > 0 {
					return nil, cobra.ShellCompDirectiveNoFileComp
				}
				return fromService(cmd, part, references)
			}
		}
	}
}

// fromService asks the service that cmd's flags, the environment or the defaults name. A shell shows no errors: none, no list.
func fromService(cmd *cobra.Command, part string, ask func(context.Context, *client.Client, *cobra.Command, string) []string) ([]string, cobra.ShellCompDirective) {
	f := serviceFlags{server: flagOf(cmd, "server"), tokenFile: flagOf(cmd, "token-file"), ca: flagOf(cmd, "server-ca")}
	c, err := f.client(cmd)
	if err != nil || c == nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), completionTime)
	defer cancel()
	directive := cobra.ShellCompDirectiveNoFileComp
	list := ask(ctx, c, cmd, part)
	for _, s := range list {
		if strings.HasSuffix(s, ":") || strings.HasSuffix(s, "/") {
			directive |= cobra.ShellCompDirectiveNoSpace // more is to come
		}
	}
	return list, directive
}

func flagOf(cmd *cobra.Command, name string) string {
	if f := cmd.Flags().Lookup(name); f != nil {
		return f.Value.String()
	}
	return ""
}

// hostOf is the registry that cmd's flags name, "" if there is none to be known.
func hostOf(cmd *cobra.Command) string {
	h := hostFlags{name: flagOf(cmd, "name"), suffix: flagOf(cmd, "suffix")}
	host, err := h.host()
	if err != nil {
		return ""
	}
	return host
}

func registries(ctx context.Context, c *client.Client, _ *cobra.Command, part string) []string {
	list, _ := c.Registries(ctx) // of an error, what there is
	return startingWith(part, list, func(r service.RegistryInfo) string { return r.Name })
}

func repositories(ctx context.Context, c *client.Client, cmd *cobra.Command, part string) []string {
	list, _ := c.Repositories(ctx, hostOf(cmd), "")
	return startingWith(part, list, func(r service.RepositoryInfo) string { return r.Name })
}

// images completes REPO, and after its colon TAG.
func images(ctx context.Context, c *client.Client, cmd *cobra.Command, part string) []string {
	return imagesOf(ctx, c, hostOf(cmd), part)
}

func imagesOf(ctx context.Context, c *client.Client, host, part string) []string {
	if repository, _, ok := strings.Cut(part, ":"); ok {
		tags, _ := c.Tags(ctx, host, repository)
		return startingWith(part, tags, func(t service.TagInfo) string { return repository + ":" + t.Name })
	}
	list, _ := c.Repositories(ctx, host, "")
	return startingWith(part, list, func(r service.RepositoryInfo) string { return r.Name + ":" })
}

// references completes HOST/REPO:TAG.
func references(ctx context.Context, c *client.Client, cmd *cobra.Command, part string) []string {
	host, rest, ok := strings.Cut(part, "/")
	if !ok {
		list, _ := c.Registries(ctx)
		return startingWith(part, list, func(r service.RegistryInfo) string { return r.Name + "/" })
	}
	list := imagesOf(ctx, c, host, rest)
	for i := range list {
		list[i] = host + "/" + list[i]
	}
	return list
}

// operations completes IDs, with what they convert beside them. For cancel they are those that can be.
func operations(ctx context.Context, c *client.Client, cmd *cobra.Command, part string) []string {
	f := service.Filter{Repository: flagOf(cmd, "repository"), Limit: 50}
	if f.Repository != "" {
		f.Registry = hostOf(cmd)
	}
	if cmd.Name() == "cancel" {
		f.States = []service.State{service.NotStarted, service.Running}
	}
	list, _ := c.Operations(ctx, f)
	return startingWith(part, list, func(op service.Operation) string {
		return op.ID + "\t" + op.Repository + " " + string(op.State)
	})
}

func startingWith[T any](part string, list []T, name func(T) string) (names []string) {
	for _, v := range list {
		if n := name(v); strings.HasPrefix(n, part) {
			names = append(names, n)
		}
	}
	return names
}
