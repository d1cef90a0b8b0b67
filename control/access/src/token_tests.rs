//! Tokens, by claims in and verdict out.

use super::*;

const AUDIENCE: &str = DEFAULT_ISSUER;

fn issuer() -> TokenIssuer {
    let key = rcgen::KeyPair::generate().unwrap();
    TokenIssuer::new(&key.serialize_pem(), DEFAULT_ISSUER, Vec::new()).unwrap()
}

fn wish() -> TokenWish {
    TokenWish {
        namespace: "ns".to_owned(),
        service_account: ObjectRef::new("sa", "uid-1"),
        audiences: Vec::new(),
        expiration_seconds: None,
        bound: None,
    }
}

fn payload(token: &str) -> serde_json::Value {
    let part = token.split('.').nth(1).unwrap();
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).unwrap()).unwrap()
}

#[test]
fn token_has_upstreams_claims() {
    let pod = Bound::Pod { pod: ObjectRef::new("p", "uid-p"), node: Some(ObjectRef::new("n", "uid-n")) };
    let issued = issuer().issue(&TokenWish { bound: Some(pod), expiration_seconds: Some(7200), ..wish() }).unwrap();
    let mut claims = payload(&issued.token);
    let iat = claims["iat"].as_i64().unwrap();
    assert!(uuid::Uuid::parse_str(claims["jti"].as_str().unwrap()).is_ok());
    claims["jti"] = "J".into();
    let expected = serde_json::json!({
        "aud": [AUDIENCE],
        "exp": iat + 7200,
        "iat": iat,
        "iss": DEFAULT_ISSUER,
        "jti": "J",
        "kubernetes.io": {
            "namespace": "ns",
            "node": { "name": "n", "uid": "uid-n" },
            "pod": { "name": "p", "uid": "uid-p" },
            "serviceaccount": { "name": "sa", "uid": "uid-1" },
        },
        "nbf": iat,
        "sub": "system:serviceaccount:ns:sa",
    });
    assert_eq!(claims, expected);
    assert_eq!(issued.expires.as_second(), iat + 7200);
}

#[test]
fn kubelets_default_token_lives_a_year_and_warns_after_an_hour() {
    let issuer = issuer();
    let pod = || Some(Bound::Pod { pod: ObjectRef::new("p", "uid-p"), node: None });
    let extended = |bound, audiences: &[&str]| {
        let audiences = audiences.iter().map(|audience| (*audience).to_owned()).collect();
        let issued = issuer.issue(&TokenWish { bound, audiences, expiration_seconds: Some(3607), ..wish() }).unwrap();
        let claims = payload(&issued.token);
        let iat = claims["iat"].as_i64().unwrap();
        assert_eq!(issued.expires.as_second(), iat + 3607);
        (claims["exp"].as_i64().unwrap() - iat, claims["kubernetes.io"]["warnafter"].as_i64().map(|at| at - iat))
    };
    assert_eq!(extended(pod(), &[]), (365 * 24 * 3600, Some(3607)));
    assert_eq!(extended(None, &[]), (3607, None));
    assert_eq!(extended(pod(), &["vault"]), (3607, None));
    assert_eq!(extended(pod(), &["vault", AUDIENCE]), (3607, None));
}

#[test]
fn expiration_has_bounds() {
    let issuer = issuer();
    for (seconds, fine) in [(599, false), (600, true), (1 << 32, true), ((1 << 32) + 1, false), (-1, false)] {
        assert_eq!(issuer.issue(&TokenWish { expiration_seconds: Some(seconds), ..wish() }).is_ok(), fine, "{seconds}");
    }
}

#[test]
fn verification_by_time_and_audience() {
    let issuer = issuer();
    let token = issuer.issue(&TokenWish { audiences: vec![AUDIENCE.to_owned(), "vault".to_owned()], ..wish() }).unwrap().token;
    let iat = payload(&token)["iat"].as_i64().unwrap();
    // age in seconds; audiences; those it's good for, or why not
    type Case = (i64, &'static [&'static str], Result<&'static [&'static str], &'static str>);
    let cases: [Case; 7] = [
        (0, &[], Ok(&[AUDIENCE])),
        (0, &["vault", "other"], Ok(&["vault"])),
        (0, &["other"], Err("is invalid for the target audiences")),
        (3660, &[], Ok(&[AUDIENCE])),
        (3661, &[], Err("has expired")),
        (-60, &[], Ok(&[AUDIENCE])),
        (-61, &[], Err("is not valid yet")),
    ];
    for (age, audiences, expected) in cases {
        let audiences: Vec<String> = audiences.iter().map(|audience| (*audience).to_owned()).collect();
        match (issuer.verify_at(&token, &audiences, iat + age), expected) {
            (Ok((claims, common)), Ok(expected)) => {
                assert_eq!(claims.kubernetes.serviceaccount.uid, "uid-1");
                assert_eq!(common, expected);
            }
            (Err(TokenError::Invalid(reason)), Err(expected)) => assert!(reason.contains(expected), "{reason}"),
            (result, expected) => panic!("{age} {audiences:?}: {result:?}, not {expected:?}"),
        }
    }
}

#[test]
fn forgeries_are_refused() {
    let issuer = issuer();
    let good = issuer.issue(&wish()).unwrap().token;
    let parts: Vec<&str> = good.split('.').collect();
    let encode = |value: serde_json::Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let mut claims = payload(&good);
    claims["sub"] = "system:serviceaccount:ns:other".into();
    let stranger = self::issuer().issue(&wish()).unwrap().token;
    let invalid = Err(TokenError::Invalid("invalid signature".to_owned()));
    let cases = [
        (stranger, invalid.clone()),
        (format!("{}.{}.{}", parts[0], encode(claims.clone()), parts[2]), invalid.clone()),
        (format!("{}.{}.", encode(serde_json::json!({ "alg": "none", "kid": "" })), parts[1]), invalid.clone()),
        (format!("{}.{}.{}", encode(serde_json::json!({ "alg": "HS256", "kid": "" })), parts[1], parts[2]), invalid),
        ("abcdef.0123456789abcdef".to_owned(), Err(TokenError::NotOurs)),
        ("a.b.c".to_owned(), Err(TokenError::NotOurs)),
        (String::new(), Err(TokenError::NotOurs)),
    ];
    for (token, expected) in cases {
        assert_eq!(issuer.verify(&token, &[]), expected, "{token}");
    }
    claims["iss"] = "https://elsewhere".into();
    assert_eq!(issuer.verify(&format!("{}.{}.{}", parts[0], encode(claims), parts[2]), &[]), Err(TokenError::NotOurs));
}

#[test]
fn legacy_token_names_its_secret_and_is_for_the_api_server() {
    let issuer = issuer();
    let token = issuer.issue_legacy("ns", &ObjectRef::new("sa", "uid-1"), "sa-token").unwrap();
    let (claims, audiences) = issuer.verify_at(&token, &[], i64::MAX / 2).unwrap();
    assert!(claims.is_legacy());
    assert_eq!(claims.kubernetes.secret, Some(ObjectRef::new("sa-token", "")));
    assert_eq!(audiences, [AUDIENCE]);
    assert!(issuer.verify(&token, &["vault".to_owned()]).is_err());
}

#[test]
fn published_key_verifies_the_signature() {
    let issuer = issuer();
    let token = issuer.issue(&wish()).unwrap().token;
    let jwk = issuer.jwks()["keys"][0].clone();
    let coordinate = |name: &str| URL_SAFE_NO_PAD.decode(jwk[name].as_str().unwrap()).unwrap();
    let point = [vec![4], coordinate("x"), coordinate("y")].concat();
    let (signed, signature) = token.rsplit_once('.').unwrap();
    let signature = URL_SAFE_NO_PAD.decode(signature).unwrap();
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point).verify(signed.as_bytes(), &signature).unwrap();
    let header: serde_json::Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(token.split('.').next().unwrap()).unwrap()).unwrap();
    assert_eq!(header["kid"], jwk["kid"]);
}
