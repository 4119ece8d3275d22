{{- define "unetpp.name" -}}
{{- if contains "unetpp" .Release.Name }}{{ .Release.Name }}{{ else }}{{ .Release.Name }}-unetpp{{ end -}}
{{- end }}

{{- /* Labels that select the pods of a release. */}}
{{- define "unetpp.selector" -}}
app.kubernetes.io/name: unetpp
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "unetpp.labels" -}}
{{ include "unetpp.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- /* Pools as a YAML list under `pools`, each with the defaults filled in; settings and autoscaling are merged. */}}
{{- define "unetpp.pools" -}}
pools:
{{- range $entry := .Values.pools }}
  {{- $pool := deepCopy $.Values.poolDefaults }}
  {{- range $name, $value := $entry }}
  {{- if has $name (list "settings" "autoscaling") }}{{ $value = mergeOverwrite (get $pool $name) $value }}{{ end }}
  {{- $_ := set $pool $name $value }}
  {{- end }}
  - {{ toYaml $pool | nindent 4 | trim }}
{{- end }}
{{- end }}

{{- define "unetpp.scheme" -}}
{{ if .Values.tls.secret }}HTTPS{{ else }}HTTP{{ end }}
{{- end }}

{{- define "unetpp.keysSecret" -}}
{{- if .Values.auth.keys }}{{ include "unetpp.name" . }}-keys{{ else }}{{ .Values.auth.keysSecret }}{{ end -}}
{{- end }}

{{- /* Draining, open requests, up to 10 s for closing, and some room. */}}
{{- define "unetpp.graceSeconds" -}}
{{ add (ceil .Values.drain.drainSeconds) .Values.drain.stopSeconds 10 5 }}
{{- end }}

{{- define "unetpp.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- /* Series of one pool, as the ServiceMonitor labels them. Argument: root and pool. */}}
{{- define "unetpp.series" -}}
namespace="{{ .root.Release.Namespace }}", release="{{ .root.Release.Name }}", pool="{{ .pool.name }}"
{{- end }}

{{- define "unetpp.behavior" -}}
scaleUp:
  stabilizationWindowSeconds: {{ .Values.autoscaling.scaleUp.stabilizationWindowSeconds }}
  policies:
    - {type: Pods, value: {{ .Values.autoscaling.scaleUp.podsPerMinute }}, periodSeconds: 60}
scaleDown:
  stabilizationWindowSeconds: {{ .Values.autoscaling.scaleDown.stabilizationWindowSeconds }}
  policies:
    - {type: Pods, value: 1, periodSeconds: {{ .Values.autoscaling.scaleDown.periodSeconds }}}
{{- end }}
