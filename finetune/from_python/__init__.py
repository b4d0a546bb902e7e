"""What `import diptych` offers."""

__version__ = "0.1.0"
