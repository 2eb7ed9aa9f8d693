"""The HTTP surface: routes, bodies, middleware, the OpenAPI document, the page."""
