//! What resources the API server has, for those who must treat them all alike.
use kube::Client;
use kube::core::ApiResource;

/// One resource in its preferred version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resource {
    pub api: ApiResource,
    pub namespaced: bool,
    pub verbs: Vec<String>,
}

impl Resource {
    pub fn can(&self, verb: &str) -> bool {
        self.verbs.iter().any(|have| have == verb)
    }

    /// The path of the whole kind, or of a namespace's objects of it.
    pub fn path(&self, namespace: Option<&str>) -> String {
        let prefix =
            if self.api.group.is_empty() { format!("/api/{}", self.api.version) } else { format!("/apis/{}", self.api.api_version) };
        match namespace.filter(|namespace| self.namespaced && !namespace.is_empty()) {
            Some(namespace) => format!("{prefix}/namespaces/{namespace}/{}", self.api.plural),
            None => format!("{prefix}/{}", self.api.plural),
        }
    }
}

/// What was found, and the groups that could not be asked.
#[derive(Debug, Default)]
pub struct Discovered {
    pub resources: Vec<Resource>,
    pub failures: Vec<(String, String)>,
}

/// All resources of the preferred versions, without subresources. A group that fails doesn't hide the others.
pub async fn discover(client: &Client) -> Result<Discovered, kube::Error> {
    let mut found = Discovered::default();
    let core = client.list_core_api_resources("v1").await?;
    found.resources.extend(core.resources.iter().filter_map(|resource| read(resource, "v1")));
    for group in client.list_api_groups().await?.groups {
        let preferred = group.preferred_version.as_ref().or(group.versions.first());
        let Some(version) = preferred.map(|version| version.group_version.clone()) else { continue };
        match client.list_api_group_resources(&version).await {
            Ok(list) => found.resources.extend(list.resources.iter().filter_map(|resource| read(resource, &version))),
            Err(error) => found.failures.push((version, error.to_string())),
        }
    }
    Ok(found)
}

fn read(resource: &k8s_openapi::apimachinery::pkg::apis::meta::v1::APIResource, group_version: &str) -> Option<Resource> {
    if resource.name.contains('/') {
        return None;
    }
    let (group, version) = group_version.split_once('/').unwrap_or(("", group_version));
    Some(Resource {
        api: ApiResource {
            group: group.to_owned(),
            version: version.to_owned(),
            api_version: group_version.to_owned(),
            kind: resource.kind.clone(),
            plural: resource.name.clone(),
        },
        namespaced: resource.namespaced,
        verbs: resource.verbs.clone(),
    })
}
