//! The columns of every built-in kind. Names, types and order are upstream's printers'.
use super::{Cell, Column, cells, pods};
use crate::resource::Resource;

use Cell::{Age, Computed, Count, Flag, Name, Number, Since, Text, Timed};

const fn text(name: &'static str, cell: Cell) -> Column {
    Column { name, kind: "string", priority: 0, cell }
}

const fn integer(name: &'static str, cell: Cell) -> Column {
    Column { name, kind: "integer", priority: 0, cell }
}

const fn flag(name: &'static str, cell: Cell) -> Column {
    Column { name, kind: "boolean", priority: 0, cell }
}

/// A column of `-o wide`.
const fn wide(name: &'static str, cell: Cell) -> Column {
    Column { name, kind: "string", priority: 1, cell }
}

const NAME: Column = text("Name", Name);
const AGE: Column = text("Age", Age);
const CONTAINERS: Column = wide("Containers", Computed(cells::container_names));
const IMAGES: Column = wide("Images", Computed(cells::container_images));
const SELECTOR: Column = wide("Selector", Computed(cells::selector));

const NAME_AND_AGE: &[Column] = &[NAME, AGE];

/// A list made at compile time.
macro_rules! columns {
    ($($column:expr),* $(,)?) => { const { &[$($column),*] } };
}

/// The columns of a kind, written for its stored version.
pub(super) fn of(resource: &Resource) -> &'static [Column] {
    match resource.group.as_ref() {
        "" | "events.k8s.io" => core(&resource.kind),
        "apps" | "batch" | "autoscaling" | "policy" => workloads(&resource.kind),
        "storage.k8s.io" => storage(&resource.kind),
        _ => others(&resource.kind),
    }
}

fn core(kind: &str) -> &'static [Column] {
    match kind {
        "Pod" => columns![
            NAME,
            text("Ready", Computed(pods::ready)),
            text("Status", Computed(pods::status)),
            text("Restarts", Timed(pods::restarts)),
            AGE,
            wide("IP", Computed(pods::address)),
            wide("Node", Text("spec.nodeName", "<none>")),
            wide("Nominated Node", Text("status.nominatedNodeName", "<none>")),
            wide("Readiness Gates", Computed(pods::readiness_gates)),
        ],
        "PodTemplate" => columns![
            NAME,
            text("Containers", Computed(cells::container_names)),
            text("Images", Computed(cells::container_images)),
            text("Pod Labels", Computed(cells::template_labels)),
        ],
        "ReplicationController" => REPLICAS,
        "Service" => columns![
            NAME,
            text("Type", Text("spec.type", "")),
            text("Cluster-IP", Computed(cells::cluster_ip)),
            text("External-IP", Computed(cells::external_ip)),
            text("Port(s)", Computed(cells::service_ports)),
            AGE,
            SELECTOR,
        ],
        "Endpoints" => columns![NAME, text("Endpoints", Computed(cells::endpoints)), AGE],
        "Node" => columns![
            NAME,
            text("Status", Computed(cells::node_status)),
            text("Roles", Computed(cells::node_roles)),
            AGE,
            text("Version", Text("status.nodeInfo.kubeletVersion", "")),
            wide("Internal-IP", Computed(cells::node_internal_ip)),
            wide("External-IP", Computed(cells::node_external_ip)),
            wide("OS-Image", Text("status.nodeInfo.osImage", "<unknown>")),
            wide("Kernel-Version", Text("status.nodeInfo.kernelVersion", "<unknown>")),
            wide("Container-Runtime", Text("status.nodeInfo.containerRuntimeVersion", "<unknown>")),
        ],
        "Event" => columns![
            text("Last Seen", Timed(cells::event_last_seen)),
            text("Type", Text("type", "")),
            text("Reason", Text("reason", "")),
            text("Object", Computed(cells::event_object)),
            wide("Subobject", Text("involvedObject.fieldPath", "")),
            wide("Source", Computed(cells::event_source)),
            text("Message", Computed(cells::event_message)),
            wide("First Seen", Timed(cells::event_first_seen)),
            wide("Count", Computed(cells::event_count)),
            wide("Name", Name),
        ],
        "Namespace" => columns![NAME, text("Status", Text("status.phase", "")), AGE],
        "Secret" => columns![NAME, text("Type", Text("type", "")), text("Data", Count("data")), AGE],
        "ConfigMap" => columns![NAME, text("Data", Computed(cells::config_entries)), AGE],
        "PersistentVolume" => columns![
            NAME,
            text("Capacity", Text("spec.capacity.storage", "0")),
            text("Access Modes", Computed(cells::volume_access_modes)),
            text("Reclaim Policy", Text("spec.persistentVolumeReclaimPolicy", "")),
            text("Status", Computed(cells::phase_or_terminating)),
            text("Claim", Computed(cells::volume_claim)),
            text("StorageClass", Computed(cells::storage_class)),
            text("VolumeAttributesClass", Text("spec.volumeAttributesClassName", "<unset>")),
            text("Reason", Text("status.reason", "")),
            AGE,
            wide("VolumeMode", Text("spec.volumeMode", "<unset>")),
        ],
        "PersistentVolumeClaim" => columns![
            NAME,
            text("Status", Computed(cells::phase_or_terminating)),
            text("Volume", Text("spec.volumeName", "")),
            text("Capacity", Computed(cells::claim_capacity)),
            text("Access Modes", Computed(cells::claim_access_modes)),
            text("StorageClass", Computed(cells::storage_class)),
            text("VolumeAttributesClass", Text("spec.volumeAttributesClassName", "<unset>")),
            AGE,
            wide("VolumeMode", Text("spec.volumeMode", "<unset>")),
        ],
        "ComponentStatus" => columns![
            NAME,
            text("Status", Computed(cells::component_status)),
            text("Message", Computed(|object| cells::component(object, "message"))),
            text("Error", Computed(|object| cells::component(object, "error"))),
        ],
        "ResourceQuota" => columns![
            NAME,
            text("Request", Computed(|quota| cells::quota(quota, false))),
            text("Limit", Computed(|quota| cells::quota(quota, true))),
            AGE,
        ],
        "LimitRange" => columns![NAME, text("Created At", Text("metadata.creationTimestamp", ""))],
        _ => NAME_AND_AGE,
    }
}

/// ReplicaSets and ReplicationControllers.
const REPLICAS: &[Column] = &[
    NAME,
    integer("Desired", Number("spec.replicas")),
    integer("Current", Number("status.replicas")),
    integer("Ready", Number("status.readyReplicas")),
    AGE,
    CONTAINERS,
    IMAGES,
    SELECTOR,
];

fn workloads(kind: &str) -> &'static [Column] {
    match kind {
        "Deployment" => columns![
            NAME,
            text("Ready", Computed(cells::ready_replicas)),
            text("Up-to-date", Number("status.updatedReplicas")),
            text("Available", Number("status.availableReplicas")),
            AGE,
            CONTAINERS,
            IMAGES,
            SELECTOR,
        ],
        "ReplicaSet" => REPLICAS,
        "StatefulSet" => columns![NAME, text("Ready", Computed(cells::ready_replicas)), AGE, CONTAINERS, IMAGES],
        "DaemonSet" => columns![
            NAME,
            integer("Desired", Number("status.desiredNumberScheduled")),
            integer("Current", Number("status.currentNumberScheduled")),
            integer("Ready", Number("status.numberReady")),
            integer("Up-to-date", Number("status.updatedNumberScheduled")),
            integer("Available", Number("status.numberAvailable")),
            text("Node Selector", Computed(cells::node_selector)),
            AGE,
            CONTAINERS,
            IMAGES,
            SELECTOR,
        ],
        "ControllerRevision" => {
            columns![NAME, text("Controller", Computed(cells::revision_controller)), text("Revision", Number("revision")), AGE]
        }
        "Job" => columns![
            NAME,
            text("Status", Computed(cells::job_status)),
            text("Completions", Computed(cells::job_completions)),
            text("Duration", Timed(cells::job_duration)),
            AGE,
            CONTAINERS,
            IMAGES,
            SELECTOR,
        ],
        "CronJob" => columns![
            NAME,
            text("Schedule", Text("spec.schedule", "")),
            text("Timezone", Text("spec.timeZone", "<none>")),
            flag("Suspend", Computed(cells::cron_suspended)),
            integer("Active", Count("status.active")),
            text("Last Schedule", Since("status.lastScheduleTime", "<none>")),
            AGE,
            CONTAINERS,
            IMAGES,
            wide("Selector", Computed(cells::cron_selector)),
        ],
        "HorizontalPodAutoscaler" => columns![
            NAME,
            text("Reference", Computed(cells::autoscaler_reference)),
            text("Targets", Computed(cells::autoscaler_metrics)),
            text("MinPods", Text("spec.minReplicas", "<unset>")),
            text("MaxPods", Number("spec.maxReplicas")),
            text("Replicas", Number("status.currentReplicas")),
            AGE,
        ],
        "PodDisruptionBudget" => columns![
            NAME,
            text("Min Available", Text("spec.minAvailable", "N/A")),
            text("Max Unavailable", Text("spec.maxUnavailable", "N/A")),
            integer("Allowed Disruptions", Number("status.disruptionsAllowed")),
            AGE,
        ],
        _ => NAME_AND_AGE,
    }
}

fn storage(kind: &str) -> &'static [Column] {
    match kind {
        "StorageClass" => columns![
            text("Name", Computed(cells::storage_class_name)),
            text("Provisioner", Text("provisioner", "")),
            text("ReclaimPolicy", Text("reclaimPolicy", "Delete")),
            text("VolumeBindingMode", Text("volumeBindingMode", "Immediate")),
            text("AllowVolumeExpansion", Flag("allowVolumeExpansion", false)),
            AGE,
        ],
        "VolumeAttributesClass" => columns![NAME, text("DriverName", Text("driverName", "")), AGE],
        "VolumeAttachment" => columns![
            NAME,
            text("Attacher", Text("spec.attacher", "")),
            text("PV", Text("spec.source.persistentVolumeName", "")),
            text("Node", Text("spec.nodeName", "")),
            flag("Attached", Flag("status.attached", false)),
            AGE,
        ],
        "CSINode" => columns![NAME, integer("Drivers", Count("spec.drivers")), AGE],
        "CSIDriver" => columns![
            NAME,
            flag("AttachRequired", Flag("spec.attachRequired", true)),
            flag("PodInfoOnMount", Flag("spec.podInfoOnMount", false)),
            flag("StorageCapacity", Flag("spec.storageCapacity", false)),
            text("TokenRequests", Computed(cells::token_audiences)),
            flag("RequiresRepublish", Flag("spec.requiresRepublish", false)),
            text("Modes", Computed(cells::lifecycle_modes)),
            AGE,
        ],
        "CSIStorageCapacity" => {
            columns![NAME, text("StorageClassName", Text("storageClassName", "")), text("Capacity", Text("capacity", "<unset>"))]
        }
        _ => NAME_AND_AGE,
    }
}

fn others(kind: &str) -> &'static [Column] {
    match kind {
        "EndpointSlice" => columns![
            NAME,
            text("AddressType", Text("addressType", "")),
            text("Ports", Computed(cells::slice_ports)),
            text("Endpoints", Computed(cells::slice_endpoints)),
            AGE,
        ],
        "Ingress" => columns![
            NAME,
            text("Class", Text("spec.ingressClassName", "<none>")),
            text("Hosts", Computed(cells::ingress_hosts)),
            text("Address", Computed(cells::load_balancer)),
            text("Ports", Computed(cells::ingress_ports)),
            AGE,
        ],
        "IngressClass" => {
            columns![NAME, text("Controller", Text("spec.controller", "")), text("Parameters", Computed(cells::class_parameters)), AGE]
        }
        "NetworkPolicy" => columns![NAME, text("Pod-Selector", Computed(cells::pod_selector)), AGE],
        "ServiceCIDR" => columns![NAME, text("CIDRs", Computed(cells::cidrs)), AGE],
        "IPAddress" => columns![NAME, text("ParentRef", Computed(cells::address_parent))],
        "Role" | "ClusterRole" => columns![NAME, text("Created At", Text("metadata.creationTimestamp", ""))],
        "RoleBinding" | "ClusterRoleBinding" => columns![
            NAME,
            text("Role", Computed(cells::role_reference)),
            AGE,
            wide("Users", Computed(|binding| cells::subjects(binding, "User"))),
            wide("Groups", Computed(|binding| cells::subjects(binding, "Group"))),
            wide("ServiceAccounts", Computed(|binding| cells::subjects(binding, "ServiceAccount"))),
        ],
        "CertificateSigningRequest" => columns![
            NAME,
            AGE,
            text("SignerName", Text("spec.signerName", "<none>")),
            text("Requestor", Text("spec.username", "")),
            text("RequestedDuration", Computed(cells::requested_duration)),
            text("Condition", Computed(cells::request_condition)),
        ],
        "Lease" => columns![NAME, text("Holder", Text("spec.holderIdentity", "")), AGE],
        "PriorityClass" => columns![
            NAME,
            integer("Value", Number("value")),
            flag("Global-Default", Flag("globalDefault", false)),
            AGE,
            text("PreemptionPolicy", Text("preemptionPolicy", "")),
        ],
        "RuntimeClass" => columns![NAME, text("Handler", Text("handler", "")), AGE],
        "MutatingWebhookConfiguration" | "ValidatingWebhookConfiguration" => columns![NAME, integer("Webhooks", Count("webhooks")), AGE],
        "ValidatingAdmissionPolicy" => {
            columns![NAME, integer("Validations", Count("spec.validations")), text("ParamKind", Computed(cells::parameter_kind)), AGE]
        }
        "ValidatingAdmissionPolicyBinding" => {
            columns![NAME, text("PolicyName", Text("spec.policyName", "")), text("ParamRef", Computed(cells::parameter_reference)), AGE]
        }
        "FlowSchema" => columns![
            NAME,
            text("PriorityLevel", Text("spec.priorityLevelConfiguration.name", "")),
            text("MatchingPrecedence", Number("spec.matchingPrecedence")),
            text("DistinguisherMethod", Text("spec.distinguisherMethod.type", "<none>")),
            AGE,
            text("MissingPL", Computed(cells::dangling)),
        ],
        "PriorityLevelConfiguration" => columns![
            NAME,
            text("Type", Text("spec.type", "")),
            text("NominalConcurrencyShares", Text("spec.limited.nominalConcurrencyShares", "<none>")),
            text("Queues", Text("spec.limited.limitResponse.queuing.queues", "<none>")),
            text("HandSize", Text("spec.limited.limitResponse.queuing.handSize", "<none>")),
            text("QueueLengthLimit", Text("spec.limited.limitResponse.queuing.queueLengthLimit", "<none>")),
            AGE,
        ],
        "ResourceClaim" => columns![NAME, text("State", Computed(cells::claim_state)), AGE],
        "ResourceSlice" => columns![
            NAME,
            text("Node", Text("spec.nodeName", "")),
            text("Driver", Text("spec.driver", "")),
            text("Pool", Text("spec.pool.name", "")),
            AGE,
        ],
        "CustomResourceDefinition" => columns![NAME, text("Created At", Text("metadata.creationTimestamp", ""))],
        "APIService" => {
            columns![NAME, text("Service", Computed(cells::api_service)), text("Available", Computed(cells::api_service_available)), AGE]
        }
        _ => NAME_AND_AGE,
    }
}
