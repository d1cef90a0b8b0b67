//! The demo that `cargo xtask up` applies: three replicas, a Service, and a client that calls it by name.

/// The demo Service's port on every node.
pub const NODE_PORT: u16 = 30080;

pub const NAMESPACE: &str = "demo";

pub fn manifest() -> String {
    format!(
        r#"apiVersion: v1
kind: Namespace
metadata:
  name: {NAMESPACE}
---
apiVersion: apps/v1
kind: Deployment
metadata:
  name: hello
  namespace: {NAMESPACE}
spec:
  replicas: 3
  selector:
    matchLabels: {{app: hello}}
  template:
    metadata:
      labels: {{app: hello}}
    spec:
      containers:
      - name: nginx
        image: {nginx}
        ports:
        - containerPort: 80
        readinessProbe:
          httpGet: {{path: /, port: 80}}
          periodSeconds: 1
        resources:
          requests: {{cpu: 10m, memory: 16Mi}}
---
apiVersion: v1
kind: Service
metadata:
  name: hello
  namespace: {NAMESPACE}
spec:
  type: NodePort
  selector: {{app: hello}}
  ports:
  - name: http
    port: 80
    nodePort: {NODE_PORT}
---
apiVersion: batch/v1
kind: Job
metadata:
  name: client
  namespace: {NAMESPACE}
spec:
  backoffLimit: 20
  template:
    spec:
      restartPolicy: OnFailure
      containers:
      - name: wget
        image: {busybox}
        command: ["sh", "-c", "until timeout 2 wget -q -O - http://hello.{NAMESPACE}.svc.cluster.local/; do sleep 0.2; done"]
"#,
        nginx = crate::images::demo::NGINX,
        busybox = crate::images::demo::BUSYBOX,
    )
}
