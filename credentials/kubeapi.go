package credentials

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

const (
	kubeTimeout = 15 * time.Second
	maxKube     = 64 << 20 // bytes of an answer: a node has hundreds of pods, and a pod at most 1.5 MB
	maxStatus   = 64 << 10
)

// kubeAPI gets JSON from an API server. client-go gives it the connection that a kubeconfig describes, certificates that are renewed and programs for tokens included,
// and not its client: that registers every type of Kubernetes, 17 MB of program and a MB of memory for three kinds of request.
type kubeAPI struct {
	file string

	mu     sync.Mutex
	stamp  string // of file
	client *http.Client
	base   *url.URL
}

// kubeStatus is an answer that is no success.
type kubeStatus struct {
	code    int
	message string
}

func (e *kubeStatus) Error() string {
	return strings.TrimSuffix(fmt.Sprintf("API server: status %d: %s", e.code, e.message), ": ")
}

// connect returns the connection of the kubeconfig as it is now.
func (k *kubeAPI) connect() (*http.Client, *url.URL, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	fi, err := os.Stat(k.file)
	if err != nil {
		return nil, nil, err
	}
	stamp := fmt.Sprint(fi.Size(), fi.ModTime().UnixNano())
	if stamp == k.stamp {
		return k.client, k.base, nil
	}
	config, err := clientcmd.BuildConfigFromFlags("", k.file)
	if err != nil {
		return nil, nil, err
	}
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, nil, err
	}
	base, _, err := rest.DefaultServerUrlFor(config)
	if err != nil {
		return nil, nil, err
	}
	if k.client != nil {
		k.client.CloseIdleConnections()
	}
	k.client, k.base, k.stamp = client, base, stamp
	return client, base, nil
}

func (k *kubeAPI) close() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.client != nil {
		k.client.CloseIdleConnections()
	}
}

// get gets an object or a list of the core group into v.
func (k *kubeAPI) get(ctx context.Context, path string, query map[string]string, v any) error {
	client, base, err := k.connect()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, kubeTimeout)
	defer cancel()
	u := base.JoinPath("api/v1", path)
	q := url.Values{}
	for key, value := range query {
		q.Set(key, value)
	}
	u.RawQuery = q.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return err
	}
	req.Header.Set("Accept", "application/json")
	resp, err := client.Do(req)
	var failed *url.Error
	if errors.As(err, &failed) {
		return failed.Err // without the whole URL
	}
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		var status struct{ Message string }
		b, _ := io.ReadAll(io.LimitReader(resp.Body, maxStatus)) // an error in an error adds nothing
		_ = json.Unmarshal(b, &status)
		return &kubeStatus{resp.StatusCode, strings.Trim(strconv.Quote(status.Message[:min(len(status.Message), maxSaid)]), `"`)}
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxKube)).Decode(v); err != nil {
		return errors.New("the API server's answer is no JSON") // and may show a secret
	}
	return nil
}
