package notary

import "testing"

// FuzzTrustPolicy: what is read as a trust policy either lets a repository's signatures be checked, or is said to let everybody sign.
func FuzzTrustPolicy(f *testing.F) {
	f.Add([]byte(`{"version":"1.0","trustPolicies":[{"name":"a","registryScopes":["*"],"signatureVerification":{"level":"strict"},"trustStores":["ca:a"],"trustedIdentities":["x509.subject:C=US,ST=WA,O=x"]}]}`))
	f.Add([]byte(`{"version":"1.0","trustPolicies":[{"name":"a","registryScopes":["r.example.com/a"],"signatureVerification":{"level":"audit","override":{"authenticity":"enforce"},"verifyTimestamp":"always"},"trustStores":["ca:a","tsa:b"],"trustedIdentities":["*"]}]}`))
	f.Add([]byte(`{"version":"1.0","trustPolicies":[{"name":"a","registryScopes":["*"],"signatureVerification":{"level":"skip"}}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := decodePolicy(b)
		if err != nil {
			return
		}
		for i := range d.TrustPolicies {
			s := &d.TrustPolicies[i]
			level, err := s.SignatureVerification.GetVerificationLevel()
			if err != nil {
				t.Fatalf("%s: %v", s.Name, err)
			}
			if enforced := level.Enforcement["authenticity"] == "enforce"; enforced == (enforces(s) != nil) {
				t.Fatalf("%s: %+v, %v", s.Name, level, enforces(s))
			}
			mayApply(s, func(string) bool { return false })
		}
	})
}
