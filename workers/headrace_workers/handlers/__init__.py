"""Handlers: async functions of an application's own that run as jobs."""
