//! Resource quantities (`100m`, `1Gi`, `1.5e3`): exact values and upstream's canonical text.
