"""The page's views, a file each: `show(api)` draws one."""
