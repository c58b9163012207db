"""Providers of chat models, one file each, behind the port `domain.ports.ChatModel`."""
