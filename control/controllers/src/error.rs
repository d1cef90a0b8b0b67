//! Why a sync failed, and what the API server meant by it.

/// A failed sync is tried again with back-off; the kinds of refusal that change a decision have a name here.
#[derive(Debug, thiserror::Error)]
pub enum SyncError {
    #[error(transparent)]
    Api(#[from] kube::Error),
    #[error("{0}")]
    Other(String),
}

impl SyncError {
    fn status(&self) -> Option<&kube::core::Status> {
        match self {
            Self::Api(kube::Error::Api(status)) => Some(status),
            _ => None,
        }
    }

    /// What the API server said, or the error itself.
    pub fn message(&self) -> String {
        self.status().map_or_else(|| self.to_string(), |status| status.message.clone())
    }

    fn is(&self, code: u16, reason: &str) -> bool {
        self.status().is_some_and(|status| status.code == code && status.reason == reason)
    }

    pub fn is_not_found(&self) -> bool {
        self.status().is_some_and(|status| status.code == 404)
    }

    pub fn is_conflict(&self) -> bool {
        self.is(409, "Conflict")
    }

    pub fn is_already_exists(&self) -> bool {
        self.is(409, "AlreadyExists")
    }

    pub fn is_forbidden(&self) -> bool {
        self.status().is_some_and(|status| status.code == 403)
    }

    pub fn is_invalid(&self) -> bool {
        self.is(422, "Invalid")
    }

    pub fn is_too_many_requests(&self) -> bool {
        self.status().is_some_and(|status| status.code == 429)
    }

    /// The namespace is going away: there is nothing to create, and nothing to report.
    pub fn is_namespace_terminating(&self) -> bool {
        let causes = self.status().and_then(|status| status.details.as_ref()).map(|details| &details.causes);
        self.is_forbidden() && causes.into_iter().flatten().any(|cause| cause.reason == "NamespaceTerminating")
    }
}

/// Turns "it's gone already" into success.
pub fn unless_gone<T>(result: Result<T, SyncError>) -> Result<(), SyncError> {
    match result {
        Ok(_) => Ok(()),
        Err(error) if error.is_not_found() || error.is_conflict() => Ok(()),
        Err(error) => Err(error),
    }
}
