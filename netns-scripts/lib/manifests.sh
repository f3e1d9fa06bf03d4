# shellcheck shell=bash
# The directories of the projects: what `kubectl get -o yaml` shows of each object, one file per object.

# uid SEED: a stable UUID.
uid() {
  local h
  h=$(printf '%s' "$1" | md5sum)
  printf '%s-%s-4%s-a%s-%s' "${h:0:8}" "${h:8:4}" "${h:13:3}" "${h:17:3}" "${h:20:12}"
}

CREATED=2025-01-01T00:00:00Z

metadata() {
  printf 'metadata:\n  creationTimestamp: "%s"\n  name: %s\n' $CREATED "$2"
  [[ -z $1 ]] || printf '  namespace: %s\n' "$1"
  printf '  resourceVersion: "1000"\n  uid: %s\n' "$(uid "$1/$2/$3")"
}

node_manifest() {
  local node=$1 n=${1#node}
  cat <<END
apiVersion: v1
kind: Node
$(metadata '' "$node" Node)
  labels:
    kubernetes.io/hostname: $node
    kubernetes.io/os: linux
spec:
  podCIDR: 10.1.$n.0/24
  podCIDRs:
  - 10.1.$n.0/24
  - fd00:10:1:$n::/64
status:
  addresses:
  - address: 192.168.77.$n
    type: InternalIP
  - address: fd77::$n
    type: InternalIP
  - address: $node
    type: Hostname
  conditions:
  - status: "True"
    type: Ready
END
}

# app POD: the label its Service selects by.
app() {
  case $1 in
    shop-web[12]) printf 'web' ;;
    bank-server) printf 'ledger' ;;
    *) printf '%s' "$1" ;;
  esac
}

pod_manifest() {
  local pod=$1 n=${NODE_OF[$1]#node}
  cat <<END
apiVersion: v1
kind: Pod
$(metadata "${PROJECT_OF[$pod]}" "$pod" Pod)
  labels:
    app: $(app "$pod")
spec:
  containers:
  - image: registry.example.test/$(app "$pod"):1
    name: main
  dnsPolicy: ClusterFirst
  nodeName: ${NODE_OF[$pod]}
  restartPolicy: Always
status:
  conditions:
  - status: "True"
    type: Ready
  containerStatuses:
  - name: main
    ready: true
    restartCount: 0
  hostIP: 192.168.77.$n
  hostIPs:
  - ip: 192.168.77.$n
  - ip: fd77::$n
  phase: Running
  podIP: ${V4[$pod]}
  podIPs:
  - ip: ${V4[$pod]}
  - ip: ${V6[$pod]}
  qosClass: BestEffort
  startTime: "$CREATED"
END
}

# ports_of PROJECT SERVICE: its rows of the table, one per port.
ports_of() { rows "$SERVICE_TABLE" | awk -v p="$1" -v s="$2" '$1 == p && $2 == s'; }

service_manifest() {
  local project=$1 service=$2 v4 v6 pname proto port target pods
  read -r _ _ v4 v6 _ _ _ _ pods < <(ports_of "$project" "$service")
  cat <<END
apiVersion: v1
kind: Service
$(metadata "$project" "$service" Service)
spec:
  clusterIP: $v4
  clusterIPs:
  - $v4
END
  [[ $v6 == None ]] || printf '  - %s\n' "$v6"
  printf '  internalTrafficPolicy: Cluster\n  ipFamilies:\n  - IPv4\n  - IPv6\n  ipFamilyPolicy: PreferDualStack\n  ports:\n'
  while read -r _ _ _ _ pname proto port target _; do
    printf '  - name: %s\n    port: %s\n    protocol: %s\n    targetPort: %s\n' "$pname" "$port" "${proto^^}" "$target"
  done < <(ports_of "$project" "$service")
  printf '  selector:\n    app: %s\n  sessionAffinity: None\n  type: ClusterIP\nstatus:\n  loadBalancer: {}\n' \
    "$(app "${pods%%,*}")"
}

slice_manifest() {
  local project=$1 service=$2 family=$3 name pods pod pname proto target headless=
  name=$service-${family,,}
  read -r _ _ v4 _ _ _ _ _ pods < <(ports_of "$project" "$service")
  [[ $v4 != None ]] || headless='    service.kubernetes.io/headless: ""'$'\n'
  cat <<END
addressType: $family
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
$(metadata "$project" "$name" EndpointSlice)
  generateName: $service-
  labels:
    endpointslice.kubernetes.io/managed-by: endpointslice-controller.k8s.io
    kubernetes.io/service-name: $service
${headless}  ownerReferences:
  - apiVersion: v1
    blockOwnerDeletion: true
    controller: true
    kind: Service
    name: $service
    uid: $(uid "$project/$service/Service")
endpoints:
END
  IFS=, read -ra pods <<<"$pods"
  for pod in "${pods[@]}"; do
    cat <<END
- addresses:
  - $(if [[ $family == IPv4 ]]; then printf '%s' "${V4[$pod]}"; else printf '%s' "${V6[$pod]}"; fi)
  conditions:
    ready: true
    serving: true
    terminating: false
  nodeName: ${NODE_OF[$pod]}
  targetRef:
    kind: Pod
    name: $pod
    namespace: $project
    uid: $(uid "$project/$pod/Pod")
END
  done
  printf 'ports:\n'
  while read -r _ _ _ _ pname proto _ target _; do
    printf -- '- name: %s\n  port: %s\n  protocol: %s\n' "$pname" "$target" "${proto^^}"
  done < <(ports_of "$project" "$service")
}

external_name_manifest() {
  cat <<END
apiVersion: v1
kind: Service
$(metadata shop ext Service)
spec:
  externalName: $EXT_NAME
  sessionAffinity: None
  type: ExternalName
status:
  loadBalancer: {}
END
}

make_directory() {
  local project=$1 dir=$RUN/directory/$1 node pod service
  mkdir -p "$dir"
  for node in "${NODES[@]}"; do node_manifest "$node" >"$dir/node-$node.yaml"; done
  for pod in "${PROJECT_PODS[@]}"; do
    [[ ${PROJECT_OF[$pod]} != "$project" ]] || pod_manifest "$pod" >"$dir/pod-$pod.yaml"
  done
  for service in $(rows "$SERVICE_TABLE" | awk -v p="$project" '$1 == p && !seen[$2]++ { print $2 }'); do
    service_manifest "$project" "$service" >"$dir/service-$service.yaml"
    slice_manifest "$project" "$service" IPv4 >"$dir/endpointslice-$service-ipv4.yaml"
    slice_manifest "$project" "$service" IPv6 >"$dir/endpointslice-$service-ipv6.yaml"
  done
  [[ $project != shop ]] || external_name_manifest >"$dir/service-ext.yaml"
}

make_key() {
  local file=$RUN/$1.key
  (
    umask 077
    if [[ -x $TENCRYPT ]] && "$TENCRYPT" keygen >"$file" 2>/dev/null && [[ -s $file ]]; then exit 0; fi
    head -c 32 /dev/urandom | base64 -w0 >"$file"
    echo >>"$file"
  )
}

make_directories() {
  local project
  for project in shop bank; do
    make_directory $project
    make_key $project
  done
}
