//! The running configuration in the shape of upstream's KubeletConfiguration, as far as there is the same setting.
use serde_json::{Value, json};

use crate::Config;

pub fn configz(config: &Config) -> Value {
    let seconds = |duration: std::time::Duration| format!("{}s", duration.as_secs());
    json!({
        "port": config.port,
        "staticPodPath": config.static_pod_path,
        "syncFrequency": seconds(config.sync_period),
        "nodeStatusUpdateFrequency": seconds(config.status_update_period),
        "nodeStatusReportFrequency": seconds(config.status_report_period),
        "nodeLeaseDurationSeconds": config.lease_seconds,
        "clusterDomain": config.cluster_domain,
        "clusterDNS": config.cluster_dns,
        "resolvConf": config.resolv_conf,
        "cgroupRoot": config.cgroup_root,
        "cgroupDriver": "cgroupfs",
        "maxPods": config.max_pods,
        "podPidsLimit": -1,
        "serializeImagePulls": config.serialize_image_pulls,
        "imageGCHighThresholdPercent": config.image_gc_high_percent,
        "imageGCLowThresholdPercent": config.image_gc_low_percent,
        "imageMinimumGCAge": seconds(config.image_minimum_age),
        "containerLogMaxSize": config.container_log_max_size.to_string(),
        "containerLogMaxFiles": config.container_log_max_files,
        "allowedUnsafeSysctls": config.allowed_unsafe_sysctls,
        "containerRuntimeEndpoint": config.runtime_endpoint,
        "authentication": {"anonymous": {"enabled": false}, "webhook": {"enabled": true, "cacheTTL": "2m0s"}},
        "authorization": {"mode": "Webhook", "webhook": {"cacheAuthorizedTTL": "5m0s", "cacheUnauthorizedTTL": "30s"}},
    })
}
