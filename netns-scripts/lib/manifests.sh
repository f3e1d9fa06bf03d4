# shellcheck shell=bash
# The directories of the projects: what `kubectl get -o yaml` shows of each object, one file per object.

# The functions print and call each other in sequence: a subshell per line would cost seconds.

CREATED=2025-01-01T00:00:00Z

# uid SEED: a stable UUID, into REPLY (FNV-1a, continued for each of its four words).
uid() {
  local hash=2166136261 words=() char i round
  for round in 1 2 3 4; do
    for ((i = 0; i < ${#1}; i++)); do
      printf -v char %d "'${1:i:1}"
      hash=$((((hash ^ char ^ round) * 16777619) & 0xffffffff))
    done
    words+=("$hash")
  done
  printf -v REPLY '%08x%08x%08x%08x' "${words[@]}"
  REPLY=${REPLY:0:8}-${REPLY:8:4}-4${REPLY:13:3}-a${REPLY:17:3}-${REPLY:20:12}
}

# metadata NAMESPACE NAME KIND: up to the UID; labels follow.
metadata() {
  printf 'metadata:\n  creationTimestamp: "%s"\n  name: %s\n' "$CREATED" "$2"
  [[ -z $1 ]] || printf '  namespace: %s\n' "$1"
  uid "$1/$2/$3"
  printf '  resourceVersion: "1000"\n  uid: %s\n' "$REPLY"
}

node_manifest() {
  local node=$1 n=${1#node}
  printf 'apiVersion: v1\nkind: Node\n'
  metadata '' "$node" Node
  cat <<END
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

# app POD: the label its Service selects by, into REPLY.
app() {
  case $1 in
    shop-web[12]) REPLY=web ;;
    bank-server) REPLY=ledger ;;
    *) REPLY=$1 ;;
  esac
}

# host_ports POD: the container's ports, if the node forwards some.
host_ports() {
  local pname proto target
  [[ $1 == "$HOST_PORT_POD" ]] || return 0
  printf '    ports:\n'
  while read -r pname proto _ target; do
    printf '    - name: %s\n      containerPort: %s\n      hostPort: %s\n      protocol: %s\n' \
      "$pname" "$target" "${HOST_PORT[$pname]}" "${proto^^}"
  done <<<"${SERVICE_PORTS[$PORTAL]}"
}

pod_manifest() {
  local pod=$1 n=${NODE_OF[$1]#node} app
  app "$pod"
  app=$REPLY
  printf 'apiVersion: v1\nkind: Pod\n'
  metadata "${PROJECT_OF[$pod]}" "$pod" Pod
  cat <<END
  labels:
    app: $app
spec:
  containers:
  - image: registry.example.test/$app:1
    name: main
$(host_ports "$pod")
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

# service_manifest PROJECT/SERVICE
service_manifest() {
  local service=$1 v4=${SERVICE_V4[$1]} v6=${SERVICE_V6[$1]} pname proto port target
  printf 'apiVersion: v1\nkind: Service\n'
  metadata "${service%/*}" "${service#*/}" Service
  printf 'spec:\n  clusterIP: %s\n  clusterIPs:\n  - %s\n' "$v4" "$v4"
  [[ $v6 == None ]] || printf '  - %s\n' "$v6"
  printf '  internalTrafficPolicy: Cluster\n  ipFamilies:\n  - IPv4\n  - IPv6\n  ipFamilyPolicy: PreferDualStack\n  ports:\n'
  while read -r pname proto port target; do
    printf '  - name: %s\n    port: %s\n    protocol: %s\n    targetPort: %s\n' "$pname" "$port" "${proto^^}" "$target"
    [[ $service != "$PORTAL" ]] || printf '    nodePort: %s\n' "${NODE_PORT[$pname]}"
  done <<<"${SERVICE_PORTS[$service]}"
  app "${SERVICE_PODS[$service]%%,*}"
  printf '  selector:\n    app: %s\n  sessionAffinity: None\n' "$REPLY"
  if [[ $service == "$PORTAL" ]]; then
    printf '  externalIPs:\n  - %s\n  - %s\n  type: LoadBalancer\n' "$EXTERNAL_IP4" "$EXTERNAL_IP6"
    printf 'status:\n  loadBalancer:\n    ingress:\n    - ip: %s\n      ipMode: VIP\n    - ip: %s\n      ipMode: VIP\n' \
      "$INGRESS4" "$INGRESS6"
  else
    printf '  type: ClusterIP\nstatus:\n  loadBalancer: {}\n'
  fi
}

# slice_manifest PROJECT/SERVICE FAMILY: FAMILY is IPv4 or IPv6.
slice_manifest() {
  local service=$1 family=$2 project=${1%/*} name=${1#*/} pods pod address pname proto target
  printf 'addressType: %s\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n' "$family"
  metadata "$project" "$name-${family,,}" EndpointSlice
  uid "$project/$name/Service"
  cat <<END
  generateName: $name-
  labels:
    endpointslice.kubernetes.io/managed-by: endpointslice-controller.k8s.io
    kubernetes.io/service-name: $name
END
  [[ ${SERVICE_V4[$service]} != None ]] || printf '    service.kubernetes.io/headless: ""\n'
  cat <<END
  ownerReferences:
  - apiVersion: v1
    blockOwnerDeletion: true
    controller: true
    kind: Service
    name: $name
    uid: $REPLY
endpoints:
END
  IFS=, read -ra pods <<<"${SERVICE_PODS[$service]}"
  for pod in "${pods[@]}"; do
    if [[ $family == IPv4 ]]; then address=${V4[$pod]}; else address=${V6[$pod]}; fi
    uid "$project/$pod/Pod"
    cat <<END
- addresses:
  - $address
  conditions:
    ready: true
    serving: true
    terminating: false
  nodeName: ${NODE_OF[$pod]}
  targetRef:
    kind: Pod
    name: $pod
    namespace: $project
    uid: $REPLY
END
  done
  printf 'ports:\n'
  while read -r pname proto _ target; do
    printf -- '- name: %s\n  port: %s\n  protocol: %s\n' "$pname" "$target" "${proto^^}"
  done <<<"${SERVICE_PORTS[$service]}"
}

external_name_manifest() {
  printf 'apiVersion: v1\nkind: Service\n'
  metadata shop ext Service
  cat <<END
spec:
  externalName: $EXT_NAME
  sessionAffinity: None
  type: ExternalName
status:
  loadBalancer: {}
END
}

make_directory() {
  local project=$1 dir=$RUN/directory/$1 node pod service name
  mkdir -p "$dir"
  for node in "${NODES[@]}"; do node_manifest "$node" >"$dir/node-$node.yaml"; done
  for pod in "${PODS[@]}"; do
    [[ ${PROJECT_OF[$pod]} != "$project" ]] || pod_manifest "$pod" >"$dir/pod-$pod.yaml"
  done
  for service in "${SERVICES[@]}"; do
    [[ $service == "$project/"* ]] || continue
    name=${service#*/}
    service_manifest "$service" >"$dir/service-$name.yaml"
    slice_manifest "$service" IPv4 >"$dir/endpointslice-$name-ipv4.yaml"
    slice_manifest "$service" IPv6 >"$dir/endpointslice-$name-ipv6.yaml"
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
  for project in shop bank kube-system; do make_directory $project; done
  for project in shop bank; do make_key $project; done
}
