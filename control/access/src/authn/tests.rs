//! Authentication by tables: credentials in, identity out.

use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::PermissionsExt;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use futures::FutureExt;
use http::HeaderValue;
use http::header::{AUTHORIZATION, HeaderName, SEC_WEBSOCKET_PROTOCOL};
use serde_json::{Value, json};

use super::*;
use crate::pki::{CertRequest, Identity, PkiConfig};
use crate::token::{Bound, DEFAULT_ISSUER, ObjectRef, TokenWish};

struct Objects(Mutex<HashMap<(LookupKind, String), Value>>);

impl Objects {
    fn set(&self, kind: LookupKind, key: &str, object: Value) {
        self.0.lock().unwrap().insert((kind, key.to_owned()), object);
    }
}

impl ObjectLookup for Objects {
    fn get<'a>(&'a self, kind: LookupKind, namespace: &'a str, name: &'a str) -> BoxFuture<'a, Result<Option<Value>, String>> {
        let found = self.0.lock().unwrap().get(&(kind, format!("{namespace}/{name}"))).cloned();
        async move { Ok(found) }.boxed()
    }
}

struct World {
    folder: tempfile::TempDir,
    pki: Pki,
    tokens: Arc<TokenIssuer>,
    objects: Arc<Objects>,
}

fn config(folder: &std::path::Path) -> PkiConfig {
    PkiConfig {
        dir: folder.join("pki"),
        service_ip: IpAddr::V4(Ipv4Addr::new(10, 96, 0, 1)),
        cluster_domain: "cluster.local".to_owned(),
        sans: vec!["api.example.com".to_owned(), "192.0.2.7".to_owned()],
    }
}

fn world() -> World {
    let folder = tempfile::tempdir().unwrap();
    let pki = Pki::open(config(folder.path())).unwrap();
    let tokens = Arc::new(TokenIssuer::new(pki.service_account_key_pem(), DEFAULT_ISSUER, Vec::new()).unwrap());
    let objects = Arc::new(Objects(Mutex::default()));
    objects.set(LookupKind::ServiceAccount, "ns/sa", json!({ "metadata": { "uid": "uid-sa" } }));
    World { folder, pki, tokens, objects }
}

impl World {
    fn authenticator(&self, config: AuthenticatorConfig) -> Authenticator {
        Authenticator::new(&self.pki, Arc::clone(&self.tokens), Arc::clone(&self.objects) as Arc<dyn ObjectLookup>, config).unwrap()
    }

    fn chain(&self, request: &CertRequest) -> Vec<CertificateDer<'static>> {
        self.pki.issue(request).unwrap().rustls_parts().unwrap().0
    }
}

fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
    pairs.iter().map(|(name, value)| (HeaderName::try_from(*name).unwrap(), HeaderValue::from_str(value).unwrap())).collect()
}

fn ask(authenticator: &Authenticator, headers: &HeaderMap, chain: &[CertificateDer<'static>]) -> Result<UserInfo, AuthnError> {
    let request = RequestCredentials { headers, peer_certificates: chain, path: "/api", is_websocket: true };
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(authenticator.authenticate(request)).map(|authenticated| authenticated.user)
}

fn bearer(authenticator: &Authenticator, token: &str) -> Result<UserInfo, AuthnError> {
    ask(authenticator, &headers(&[("authorization", &format!("Bearer {token}"))]), &[])
}

#[test]
fn client_certificate_names_user_and_groups() {
    let world = world();
    let authenticator = world.authenticator(AuthenticatorConfig::default());
    let chain = world.chain(&CertRequest::client("system:node:n", ["system:nodes", "more"]));
    for _ in 0..2 {
        let user = ask(&authenticator, &HeaderMap::new(), &chain).unwrap();
        assert_eq!(
            (user.name.as_str(), user.groups.as_slice()),
            ("system:node:n", &["system:nodes", "more", "system:authenticated"].map(str::to_owned)[..])
        );
        assert!(user.extra[crate::user::EXTRA_CREDENTIAL_ID][0].starts_with("X509SHA256="));
    }
    let serving_only = world.chain(&CertRequest::serving("x", vec!["localhost".to_owned()]));
    let stranger = self::world().chain(&CertRequest::client("anna", ["system:masters"]));
    let expired = world.chain(&CertRequest { lifetime: Some(Duration::ZERO), ..CertRequest::client("anna", [""; 0]) });
    // Certificates count in seconds.
    std::thread::sleep(Duration::from_millis(1100));
    for chain in [serving_only, stranger, expired] {
        assert!(matches!(ask(&authenticator, &HeaderMap::new(), &chain), Err(AuthnError::Unauthorized(_))));
    }
}

#[test]
fn front_proxy_speaks_for_others() {
    let world = world();
    let authenticator = world.authenticator(AuthenticatorConfig::default());
    let remote =
        headers(&[("x-remote-user", "anna"), ("x-remote-group", "a"), ("x-remote-group", "b"), ("x-remote-extra-acme%2fkey", "v")]);
    let proxy = world.pki.front_proxy_client().rustls_parts().unwrap().0;
    let user = ask(&authenticator, &remote, &proxy).unwrap();
    assert_eq!((user.name.as_str(), user.groups.join(" ")), ("anna", "a b system:authenticated".to_owned()));
    assert_eq!(user.extra["acme/key"], ["v"]);
    // Anybody else's headers mean nothing.
    let other = world.chain(&CertRequest::client("front-proxy-client", [""; 0]));
    assert_eq!(ask(&authenticator, &remote, &other).unwrap().name, "front-proxy-client");
    assert_eq!(ask(&authenticator, &remote, &[]).unwrap().name, ANONYMOUS);
}

#[test]
fn anonymous_where_allowed() {
    let world = world();
    let cases = [
        (AnonymousPolicy::Everywhere, true),
        (AnonymousPolicy::Never, false),
        (AnonymousPolicy::Paths(vec!["/healthz".to_owned()]), false),
        (AnonymousPolicy::Paths(vec!["/api".to_owned()]), true),
    ];
    for (anonymous, allowed) in cases {
        let authenticator = world.authenticator(AuthenticatorConfig { anonymous: anonymous.clone(), ..AuthenticatorConfig::default() });
        assert_eq!(ask(&authenticator, &HeaderMap::new(), &[]).is_ok(), allowed, "{anonymous:?}");
        assert!(bearer(&authenticator, "nonsense").is_err(), "a bad token is never anonymous");
    }
}

#[test]
fn static_tokens_from_a_file() {
    let world = world();
    let static_tokens = parse_token_file("secret1,anna,1,\"dev,ops\"\n\nsecret2,bert,2\n,empty,3\n").unwrap();
    let authenticator = world.authenticator(AuthenticatorConfig { static_tokens, ..AuthenticatorConfig::default() });
    let anna = bearer(&authenticator, "secret1").unwrap();
    assert_eq!((anna.name.as_str(), anna.uid.as_str(), anna.groups.join(" ")), ("anna", "1", "dev ops system:authenticated".to_owned()));
    assert_eq!(bearer(&authenticator, "secret2").unwrap().name, "bert");
    for bad in ["secret", "secret11", "", " secret1"] {
        assert!(bearer(&authenticator, bad).map(|user| user.name).as_deref() != Ok("anna"), "{bad:?}");
    }
    assert!(parse_token_file("a,b").is_err());
    assert!(parse_token_file("a,b,c,\"open").is_err());
}

#[test]
fn websocket_carries_a_token_in_its_protocols() {
    let world = world();
    let static_tokens = parse_token_file("secret1,anna,1").unwrap();
    let authenticator = world.authenticator(AuthenticatorConfig { static_tokens, ..AuthenticatorConfig::default() });
    let encoded = format!("base64url.bearer.authorization.k8s.io.{}", URL_SAFE_NO_PAD.encode("secret1"));
    let protocols = |value: &str| {
        let mut map = HeaderMap::new();
        map.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_str(value).unwrap());
        map
    };
    assert_eq!(ask(&authenticator, &protocols(&format!("v5.channel.k8s.io, {encoded}")), &[]).unwrap().name, "anna");
    assert!(ask(&authenticator, &protocols(&format!("{encoded}, {encoded}")), &[]).is_err());
    assert_eq!(ask(&authenticator, &protocols("v5.channel.k8s.io"), &[]).unwrap().name, ANONYMOUS);
    let mut both = protocols(&encoded);
    both.insert(AUTHORIZATION, HeaderValue::from_static("Basic x"));
    assert_eq!(ask(&authenticator, &both, &[]).unwrap().name, "anna");
}

#[test]
fn service_account_token_lives_with_its_objects() {
    let world = world();
    let bound = |bound| {
        let wish = TokenWish {
            namespace: "ns".to_owned(),
            service_account: ObjectRef::new("sa", "uid-sa"),
            audiences: Vec::new(),
            expiration_seconds: None,
            bound,
        };
        world.tokens.issue(&wish).unwrap().token
    };
    let pod = Some(Bound::Pod { pod: ObjectRef::new("p", "uid-p"), node: Some(ObjectRef::new("n", "uid-n")) });
    let tokens = [bound(None), bound(pod), bound(Some(Bound::Node(ObjectRef::new("n", "uid-n"))))];
    // A fresh authenticator each time: good tokens are remembered for a while.
    let verdicts = || [0, 1, 2].map(|number: usize| bearer(&world.authenticator(AuthenticatorConfig::default()), &tokens[number]).is_ok());
    assert_eq!(verdicts(), [true, false, false], "no pod and no node yet");
    world.objects.set(LookupKind::Pod, "ns/p", json!({ "metadata": { "uid": "uid-p" } }));
    assert_eq!(verdicts(), [true, true, false], "a pod's token doesn't need the node");
    let user = bearer(&world.authenticator(AuthenticatorConfig::default()), &tokens[1]).unwrap();
    assert_eq!((user.name.as_str(), user.uid.as_str()), ("system:serviceaccount:ns:sa", "uid-sa"));
    assert_eq!(user.groups, ["system:serviceaccounts", "system:serviceaccounts:ns", "system:authenticated"]);
    assert_eq!(user.extra["authentication.kubernetes.io/pod-name"], ["p"]);
    assert_eq!(user.extra["authentication.kubernetes.io/node-uid"], ["uid-n"]);
    world.objects.set(LookupKind::Node, "/n", json!({ "metadata": { "uid": "uid-n" } }));
    assert_eq!(verdicts(), [true, true, true]);
    world.objects.set(LookupKind::Pod, "ns/p", json!({ "metadata": { "uid": "uid-p", "deletionTimestamp": "2020-01-01T00:00:00Z" } }));
    assert_eq!(verdicts(), [true, false, true]);
    world.objects.set(LookupKind::ServiceAccount, "ns/sa", json!({ "metadata": { "uid": "recreated" } }));
    assert_eq!(verdicts(), [false, false, false]);
}

#[test]
fn legacy_token_must_be_its_secrets() {
    let world = world();
    let token = world.tokens.issue_legacy("ns", &ObjectRef::new("sa", "uid-sa"), "s").unwrap();
    let other = world.tokens.issue_legacy("ns", &ObjectRef::new("sa", "uid-sa"), "s").unwrap();
    world.objects.set(LookupKind::Secret, "ns/s", json!({ "metadata": { "uid": "u" }, "data": { "token": STANDARD.encode(&token) } }));
    let authenticator = world.authenticator(AuthenticatorConfig::default());
    assert_eq!(bearer(&authenticator, &token).unwrap().name, "system:serviceaccount:ns:sa");
    assert!(bearer(&authenticator, &other).is_err());
}

#[test]
fn bootstrap_tokens_by_their_secret() {
    let world = world();
    let authenticator = world.authenticator(AuthenticatorConfig { bootstrap_tokens: true, ..AuthenticatorConfig::default() });
    let secret = |changes: &[(&str, &str)]| {
        let mut fields = vec![("token-id", "abcdef"), ("token-secret", "0123456789abcdef"), ("usage-bootstrap-authentication", "true")];
        fields.extend_from_slice(changes);
        let data: serde_json::Map<String, Value> =
            fields.into_iter().map(|(key, value)| (key.to_owned(), STANDARD.encode(value).into())).collect();
        json!({ "metadata": {}, "type": "bootstrap.kubernetes.io/token", "data": data })
    };
    let cases: [(&[(&str, &str)], bool); 7] = [
        (&[], true),
        (&[("token-secret", "0123456789abcdeX")], false),
        (&[("usage-bootstrap-authentication", "false")], false),
        (&[("expiration", "2020-01-01T00:00:00Z")], false),
        (&[("expiration", "soon")], false),
        (&[("expiration", "2099-01-01T00:00:00Z")], true),
        (&[("auth-extra-groups", "system:masters")], false),
    ];
    for (changes, good) in cases {
        world.objects.set(LookupKind::Secret, "kube-system/bootstrap-token-abcdef", secret(changes));
        let authenticator = world.authenticator(AuthenticatorConfig { bootstrap_tokens: true, ..AuthenticatorConfig::default() });
        assert_eq!(bearer(&authenticator, "abcdef.0123456789abcdef").is_ok(), good, "{changes:?}");
    }
    world.objects.set(
        LookupKind::Secret,
        "kube-system/bootstrap-token-abcdef",
        secret(&[("auth-extra-groups", "system:bootstrappers:kubeadm:x")]),
    );
    let user = bearer(&authenticator, "abcdef.0123456789abcdef").unwrap();
    assert_eq!(
        (user.name.as_str(), user.groups.join(" ")),
        ("system:bootstrap:abcdef", "system:bootstrappers system:bootstrappers:kubeadm:x system:authenticated".to_owned())
    );
}

#[test]
fn impersonation_asks_for_each_part() {
    let check = |api_group, resource, subresource: &str, namespace: &str, name: &str| ImpersonationCheck {
        api_group,
        resource,
        subresource: subresource.to_owned(),
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    };
    assert_eq!(parse_impersonation(&HeaderMap::new()), Ok(None));
    let all = headers(&[
        ("Impersonate-User", "anna"),
        ("Impersonate-Group", "dev"),
        ("Impersonate-Uid", "7"),
        ("Impersonate-Extra-Acme.com%2Fx", "v"),
    ]);
    let found = parse_impersonation(&all).unwrap().unwrap();
    assert_eq!(
        (found.user.name.as_str(), found.user.uid.as_str(), found.user.groups.join(" ")),
        ("anna", "7", "dev system:authenticated".to_owned())
    );
    assert_eq!(found.user.extra["acme.com/x"], ["v"]);
    let expected = [
        check("", "users", "", "", "anna"),
        check("", "groups", "", "", "dev"),
        check("authentication.k8s.io", "userextras", "acme.com/x", "", "v"),
        check("authentication.k8s.io", "uids", "", "", "7"),
    ];
    assert_eq!(found.checks, expected);
    let mut stripped = all;
    stripped.insert("accept", HeaderValue::from_static("x"));
    strip_impersonation(&mut stripped);
    assert_eq!(stripped.len(), 1);

    let groups = |pairs: &[(&str, &str)]| parse_impersonation(&headers(pairs)).unwrap().unwrap().user.groups.join(" ");
    assert_eq!(
        groups(&[("Impersonate-User", "system:serviceaccount:ns:sa")]),
        "system:serviceaccounts system:serviceaccounts:ns system:authenticated"
    );
    assert_eq!(groups(&[("Impersonate-User", "system:anonymous")]), "system:unauthenticated");
    assert_eq!(groups(&[("Impersonate-User", "x"), ("Impersonate-Group", "system:unauthenticated")]), "system:unauthenticated");
    assert!(matches!(parse_impersonation(&headers(&[("Impersonate-Group", "dev")])), Err(AuthnError::BadRequest(_))));
}

#[test]
fn pki_is_kept_and_repaired() {
    let World { folder, pki, .. } = world();
    let dir = folder.path().join("pki");
    let mode = |name: &str| std::fs::metadata(dir.join(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!(std::fs::metadata(&dir).unwrap().permissions().mode() & 0o777, 0o700);
    for key in
        ["ca.key", "apiserver.key", "front-proxy-ca.key", "front-proxy-client.key", "sa.key", "apiserver-kubelet-client.key", "admin.key"]
    {
        assert_eq!(mode(key), 0o600, "{key}");
    }
    assert_eq!(mode("ca.crt"), 0o644);

    let again = Pki::open(config(folder.path())).unwrap();
    assert_eq!((again.ca_pem(), &again.api_server().cert_pem), (pki.ca_pem(), &pki.api_server().cert_pem), "nothing to change");

    let mut more_names = config(folder.path());
    more_names.sans.push("new.example.com".to_owned());
    let renamed = Pki::open(more_names).unwrap();
    assert_ne!(renamed.api_server().cert_pem, pki.api_server().cert_pem);
    assert_eq!((renamed.ca_pem(), &renamed.admin().cert_pem), (pki.ca_pem(), &pki.admin().cert_pem));

    // A crash between key and certificate leaves a pair that doesn't fit.
    let stranger = pki.issue(&CertRequest::client("x", [""; 0])).unwrap();
    std::fs::write(dir.join("admin.key"), stranger.key_pem).unwrap();
    let repaired = Pki::open(config(folder.path())).unwrap();
    assert_ne!(repaired.admin().cert_pem, pki.admin().cert_pem);

    let soon = pki
        .issue(&CertRequest {
            lifetime: Some(Duration::from_secs(29 * 24 * 3600)),
            ..CertRequest::client("kubernetes-admin", ["system:masters"])
        })
        .unwrap();
    std::fs::write(dir.join("admin.key"), &soon.key_pem).unwrap();
    std::fs::write(dir.join("admin.crt"), &soon.cert_pem).unwrap();
    assert_ne!(Pki::open(config(folder.path())).unwrap().admin().cert_pem, soon.cert_pem, "renewed before it expires");

    std::fs::remove_file(dir.join("ca.key")).unwrap();
    assert!(Pki::open(config(folder.path())).is_err(), "a lost CA key is for a person to decide about");
}

#[test]
fn csr_is_signed_with_the_usages_asked_for() {
    let world = world();
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(vec!["node.example.com".to_owned()]).unwrap();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(rcgen::DnType::OrganizationName, "system:nodes");
    params.distinguished_name.push(rcgen::DnType::CommonName, "system:node:x");
    let csr = params.serialize_request(&key).unwrap().pem().unwrap();
    let usages = ["digital signature", "client auth"].map(str::to_owned);
    let cert_pem = world.pki.sign_csr(&csr, &usages, Duration::from_secs(3600)).unwrap();
    let chain = Identity { cert_pem, key_pem: key.serialize_pem() }.rustls_parts().unwrap().0;
    let authenticator = world.authenticator(AuthenticatorConfig::default());
    let user = ask(&authenticator, &HeaderMap::new(), &chain).unwrap();
    assert_eq!((user.node_name(), user.groups[0].as_str()), (Some("x"), "system:nodes"));
    assert!(world.pki.sign_csr(&csr, &["fly".to_owned()], Duration::from_secs(3600)).is_err());
    assert!(world.pki.sign_csr("nonsense", &usages, Duration::from_secs(3600)).is_err());
}

#[test]
fn kubeconfig_is_private_and_complete() {
    let world = world();
    let path = world.folder.path().join("admin.kubeconfig");
    let kubeconfig = crate::kubeconfig::Kubeconfig {
        cluster: "outrigger",
        server: "https://127.0.0.1:6443",
        ca_pem: world.pki.ca_pem(),
        user: "kubernetes-admin",
        identity: world.pki.admin(),
    };
    kubeconfig.write(&path).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let read: Value = serde_yaml_ng::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    assert_eq!(read["clusters"][0]["cluster"]["server"], "https://127.0.0.1:6443");
    assert_eq!(read["current-context"], read["contexts"][0]["name"]);
    let key = STANDARD.decode(read["users"][0]["user"]["client-key-data"].as_str().unwrap()).unwrap();
    assert_eq!(key, world.pki.admin().key_pem.as_bytes());
    assert!(!format!("{:?}", world.pki.admin()).contains("PRIVATE"), "keys don't get into logs");
}
