//! Who is asking, and may they: certificates and tokens, authentication, and the RBAC and Node authorizers.
//!
//! The API server feeds [`rbac::RbacIndex`] and [`node::NodeGraph`] from its watches and answers [`authn::ObjectLookup`]; everything else
//! here is decided from the request alone. Nothing in this crate logs a secret.

pub mod attributes;
pub mod authn;
pub mod bootstrap;
pub mod csr;
mod files;
pub mod kubeconfig;
pub mod node;
pub mod pki;
pub mod rbac;
mod rules;
mod tls;
pub mod token;
pub mod user;

pub use attributes::{Attributes, Authorizer, Decision, FieldRequirement, ResourceRules, RulesReview, Union};
pub use authn::{Authenticated, Authenticator, AuthnError, ObjectLookup};
pub use user::UserInfo;
