// The OpenAPI document of this server, in Swagger UI. Nothing is fetched from another host.
window.SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#operations",
  deepLinking: true,
  defaultModelsExpandDepth: 0,
  displayRequestDuration: true,
  // Swagger UI sends a field that was left empty, and the server refuses a reference that is no file.
  // Its Accept would be the first media type, which no volume has: the parameter `format` chooses instead.
  requestInterceptor: (request) => {
    if (request.method === "POST") request.headers.Accept = "*/*";
    if (request.body instanceof FormData && request.body.get("reference") === "") request.body.delete("reference");
    return request;
  },
  // Otherwise the address of this server would be sent to validator.swagger.io.
  validatorUrl: null,
});
