//! Handshakes in memory: who gets in, and as whom.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr};

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection};

use super::*;
use crate::pki::{CertRequest, Identity, PkiConfig};

fn pki(folder: &tempfile::TempDir) -> Pki {
    let config = PkiConfig {
        dir: folder.path().join("pki"),
        service_ip: IpAddr::V4(Ipv4Addr::new(10, 96, 0, 1)),
        cluster_domain: "cluster.local".to_owned(),
        sans: vec!["api.example.com".to_owned()],
    };
    Pki::open(config).unwrap()
}

fn server(pki: &Pki) -> ServerConnection {
    let (chain, key) = pki.api_server().rustls_parts().unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(client_cert_acceptor(pki).unwrap())
        .with_single_cert(chain, key)
        .unwrap();
    ServerConnection::new(Arc::new(config)).unwrap()
}

fn client(pki: &Pki, name: &str, identity: Option<&Identity>) -> ClientConnection {
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots(pki.ca_pem()).unwrap());
    let config = match identity {
        Some(identity) => {
            let (chain, key) = identity.rustls_parts().unwrap();
            builder.with_client_auth_cert(chain, key).unwrap()
        }
        None => builder.with_no_client_auth(),
    };
    ClientConnection::new(Arc::new(config), ServerName::try_from(name.to_owned()).unwrap()).unwrap()
}

/// Carries bytes between the two until both are done.
fn shake(client: &mut ClientConnection, server: &mut ServerConnection) -> Result<(), Error> {
    while client.is_handshaking() || server.is_handshaking() || client.wants_write() || server.wants_write() {
        let mut wire = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut wire).unwrap();
        }
        feed(&wire, |bytes| server.read_tls(bytes));
        server.process_new_packets()?;
        wire.clear();
        while server.wants_write() {
            server.write_tls(&mut wire).unwrap();
        }
        feed(&wire, |bytes| client.read_tls(bytes));
        client.process_new_packets()?;
    }
    Ok(())
}

fn feed(mut wire: &[u8], mut read: impl FnMut(&mut &[u8]) -> std::io::Result<usize>) {
    while !wire.is_empty() {
        match read(&mut wire) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::Other => return,
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn every_name_of_the_server_is_in_its_certificate() {
    let folder = tempfile::tempdir().unwrap();
    let pki = pki(&folder);
    for (name, good) in [
        ("kubernetes", true),
        ("kubernetes.default", true),
        ("kubernetes.default.svc", true),
        ("kubernetes.default.svc.cluster.local", true),
        ("localhost", true),
        ("127.0.0.1", true),
        ("10.96.0.1", true),
        ("api.example.com", true),
        ("example.com", false),
        ("192.0.2.1", false),
    ] {
        assert_eq!(shake(&mut client(&pki, name, None), &mut server(&pki)).is_ok(), good, "{name}");
    }
}

#[test]
fn handshake_proves_the_key_and_leaves_trust_for_later() {
    let (folder, other_folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (pki, other) = (pki(&folder), self::pki(&other_folder));
    let stranger = other.issue(&CertRequest::client("anna", [""; 0])).unwrap();
    for identity in [None, Some(pki.admin()), Some(&stranger)] {
        let mut server = server(&pki);
        shake(&mut client(&pki, "localhost", identity), &mut server).unwrap();
        let seen = server.peer_certificates().map(<[_]>::to_vec);
        assert_eq!(seen, identity.map(|identity| identity.rustls_parts().unwrap().0));
    }
    // Somebody else's certificate with one's own key.
    let stolen = Identity { cert_pem: pki.admin().cert_pem.clone(), key_pem: stranger.key_pem };
    let (chain, key) = stolen.rustls_parts().unwrap();
    let signer = ring::sign::any_supported_type(&key).unwrap();
    let resolver = Arc::new(rustls::sign::SingleCertAndKey::from(rustls::sign::CertifiedKey::new(chain, signer)));
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots(pki.ca_pem()).unwrap())
        .with_client_cert_resolver(resolver);
    let mut thief = ClientConnection::new(Arc::new(config), ServerName::try_from("localhost").unwrap()).unwrap();
    assert!(shake(&mut thief, &mut server(&pki)).is_err());
}
