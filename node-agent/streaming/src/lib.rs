//! Kubernetes' streaming protocols: SPDY/3.1 and WebSocket, for exec, attach and port-forward.
//!
//! [`upgrade`] turns an HTTP request into a [`session::Session`] or a stream of port-forward connections, whichever protocol the
//! client speaks; [`client`] opens the same towards the container runtime.
#![cfg_attr(test, allow(clippy::type_complexity, reason = "tables of cases have long types"))]
pub mod client;
pub mod portforward;
pub mod session;
pub mod spdy;
pub mod upgrade;
pub mod websocket;
