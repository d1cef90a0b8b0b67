//! Asks the API server who somebody is and what they may do, for the node's own API.
use std::collections::BTreeMap;

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use k8s_openapi::api::authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec};
use kube::api::PostParams;
use kube::{Api, Client};

/// Who makes a request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct User {
    pub name: String,
    pub uid: String,
    pub groups: Vec<String>,
    pub extra: BTreeMap<String, Vec<String>>,
}

/// What a request wants of this node: a verb on `nodes/<subresource>`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NodeAccess {
    pub verb: String,
    pub node: String,
    pub subresource: String,
}

/// The reviews; cheap to clone.
#[derive(Clone)]
pub struct Reviews {
    client: Client,
}

impl Reviews {
    pub fn new(client: Client) -> Self {
        Self { client }
    }

    /// The owner of a bearer token; `None` when the API server doesn't know it.
    pub async fn token(&self, token: &str) -> Result<Option<User>, kube::Error> {
        let review = TokenReview { spec: TokenReviewSpec { token: Some(token.to_owned()), audiences: None }, ..TokenReview::default() };
        let answer = Api::<TokenReview>::all(self.client.clone()).create(&PostParams::default(), &review).await?;
        let Some(status) = answer.status.filter(|status| status.authenticated == Some(true)) else { return Ok(None) };
        Ok(status.user.map(|user| User {
            name: user.username.unwrap_or_default(),
            uid: user.uid.unwrap_or_default(),
            groups: user.groups.unwrap_or_default(),
            extra: user.extra.unwrap_or_default(),
        }))
    }

    /// Whether `user` may do it.
    pub async fn allowed(&self, user: &User, access: &NodeAccess) -> Result<bool, kube::Error> {
        let spec = SubjectAccessReviewSpec {
            user: Some(user.name.clone()),
            uid: Some(user.uid.clone()).filter(|uid| !uid.is_empty()),
            groups: Some(user.groups.clone()),
            extra: Some(user.extra.clone()),
            resource_attributes: Some(ResourceAttributes {
                verb: Some(access.verb.clone()),
                version: Some("v1".to_owned()),
                resource: Some("nodes".to_owned()),
                subresource: Some(access.subresource.clone()),
                name: Some(access.node.clone()),
                ..ResourceAttributes::default()
            }),
            non_resource_attributes: None,
        };
        let review = SubjectAccessReview { spec, ..SubjectAccessReview::default() };
        let answer = Api::<SubjectAccessReview>::all(self.client.clone()).create(&PostParams::default(), &review).await?;
        Ok(answer.status.is_some_and(|status| status.allowed))
    }
}
